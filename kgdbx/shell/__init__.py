"""The shell: one prompt over gdb, kgdbx's commands and drgn, for several kernels at a time.

Each session is a gdb of its own under the machine interface (GDB/MI); this process has the
terminal, and gdb has the kernel.
"""
