"""Settings of gdb that are a target's while it is open."""

import gdb

__all__ = ("GdbSettings",)


class GdbSettings:
    """Changes settings, and puts them back as they were.

    SIGTRAP is always among them: ``nostop noprint nopass``.

    :param values: new values by name, as ``set`` takes them
    """

    def __init__(self, values: dict[str, str]) -> None:
        self._before = {name: _value(name) for name in values}
        row = gdb.execute("info signals SIGTRAP", to_string=True).splitlines()[-1].split()
        stop, show, forward = (word == "Yes" for word in row[1:4])
        self._sigtrap = " ".join(
            (
                "stop" if stop else "nostop",
                "print" if show else "noprint",
                "pass" if forward else "nopass",
            )
        )
        self._set(values, "nostop noprint nopass")

    def restore(self) -> None:
        """Put them back."""
        self._set(self._before, self._sigtrap)

    def _set(self, values: dict[str, str], sigtrap: str) -> None:
        for name, value in values.items():
            gdb.execute(f"set {name} {value}", to_string=True)
        gdb.execute(f"with confirm off -- handle SIGTRAP {sigtrap}", to_string=True)


def _value(name: str) -> str:
    value = gdb.parameter(name)
    if value is None:
        return "auto"
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
