"""A stub by its address, and what is completed on another kernel."""

from collections.abc import Callable

from kgdbx.bench.terminal import Terminal
from kgdbx.machine.vm import Vm


def test_a_stub_by_its_address(
    clone_of: Callable[..., Vm], shell_in: Callable[..., Terminal]
) -> None:
    vm = clone_of(kernel="6.12", smp=2)
    assert vm.execute("modprobe dummy").status == 0
    t = shell_in("--connect", str(vm.info.gdb_socket), str(vm.info.vmlinux), columns=120, rows=30)
    t.wait("cpu 0>", 90)

    def candidate(*words: str) -> None:
        t.wait(lambda: any(all(word in line for word in words) for line in t.display()[1:]))

    t.type("\x0ckprobe vfs_rea")
    candidate("vfs_readlink", "int vfs_readlink(struct dentry *dentry")
    t.type("d fi")
    candidate("file", "struct file *")
    t.type("le->f_inode->i_in")
    candidate("i_ino", "unsigned long")
    candidate("ssize_t vfs_read(struct file *file, char *buf, size_t count, loff_t *pos)")
    t.type("\x15nullify --fr")
    candidate("--from", "only calls from this module")
    t.type("om du")
    candidate("dummy", "module")
    t.type("mmy dummy:dummy_xm")
    t.wait(lambda: any(line.split() == ["dummy_xmit"] for line in t.display()))
    t.type("\x15>>> find_ta")
    candidate("find_task", "(")
    t.type("sk(1).comm\r")
    t.wait('(char [16])"agent"')
    t.line("kretprobe ksys_read fd")
    t.wait("Probe 1 ")
    t.line("c")
    t.wait("running>")
    read = vm.start("cat /etc/hostname")
    t.wait("r_ksys_read_0: (")
    t.line("quit")
    assert t.end() == 0
    assert read.wait(20).status == 0
