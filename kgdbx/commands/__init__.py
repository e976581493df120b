"""Commands: one a file, registered once for every face.

``session`` holds those of an attached kernel, for gdb and the shell; ``program`` those of the
command line.
"""
