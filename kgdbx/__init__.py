"""Kernel probes from the outside: Python driving a Linux kernel through QEMU's gdbstub or KGDB."""
