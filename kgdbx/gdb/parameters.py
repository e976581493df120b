"""``set kgdbx ...`` and ``show kgdbx ...``."""

import gdb

__all__ = ("DebugParameter",)


class _SetPrefix(gdb.Command):
    """Change settings of kgdbx."""

    def __init__(self) -> None:
        super().__init__("set kgdbx", gdb.COMMAND_SUPPORT, gdb.COMPLETE_NONE, True)


class _ShowPrefix(gdb.Command):
    """Show settings of kgdbx."""

    def __init__(self) -> None:
        super().__init__("show kgdbx", gdb.COMMAND_SUPPORT, gdb.COMPLETE_NONE, True)


class DebugParameter(gdb.Parameter):
    """Whether errors of kgdbx show a Python traceback."""

    set_doc = "Set whether errors of kgdbx show a Python traceback."
    show_doc = "Show whether errors of kgdbx show a Python traceback."

    def __init__(self) -> None:
        _SetPrefix()
        _ShowPrefix()
        super().__init__("kgdbx debug", gdb.COMMAND_SUPPORT, gdb.PARAM_BOOLEAN)
        self.value = False

    def get_show_string(self, value: str) -> str:
        return f"Tracebacks of kgdbx errors are {value}."
