"""``python -m kgdbx.machine``: fetch QEMU and all kernels and build the one with KGDB, so that
tests need no network and do not wait for it.
"""

from kgdbx.machine.kernels import FLAVOURS, fetch_kernel
from kgdbx.machine.kgdb_kernel import get_kgdb_kernel
from kgdbx.machine.qemu import find_qemu


def main() -> None:
    """Fetch or build what is not there and say where it is."""
    print(find_qemu().path)
    for flavour in FLAVOURS:
        print(fetch_kernel(flavour.name).vmlinux)
    print(get_kgdb_kernel().vmlinux)


if __name__ == "__main__":
    main()
