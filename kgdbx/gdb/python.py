"""The Python that gdb was built with, as a program."""

import os
import shutil
import sys

__all__ = ("python_of_gdb",)


def python_of_gdb() -> str:
    """Path or name of it; gdb's ``sys.executable`` is a guess that need not exist."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return shutil.which(name, path=os.path.join(sys.exec_prefix, "bin")) or name
