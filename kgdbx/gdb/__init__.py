"""The gdb face: kgdbx's commands as gdb commands, over gdb's own connection."""
