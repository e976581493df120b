"""Public names are listed, sorted, documented, and there."""

import importlib
import pkgutil

import pytest

import kgdbx

# What can be imported without gdb, and is not a file of command registrations.
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(kgdbx.__path__, "kgdbx.")
    if not module.ispkg
    and not module.name.endswith("__main__")
    and ".gdb." not in module.name
    and not module.name.startswith("kgdbx.target.gdb_")
    and not module.name.startswith(
        ("kgdbx.commands.program.", "kgdbx.commands.session.", "kgdbx.shell.commands.")
    )
    and module.name not in ("kgdbx.bench.in_gdb", "kgdbx.shell.program")
)


@pytest.mark.parametrize("name", MODULES)
def test_all(name: str) -> None:
    module = importlib.import_module(name)
    listed = module.__all__
    assert list(listed) == sorted(listed), f"{name}.__all__ is not sorted"
    for each in listed:
        assert hasattr(module, each)
    defined = {
        each
        for each, value in vars(module).items()
        if not each.startswith("_") and getattr(value, "__module__", None) == name
    }
    constants_and_types = {e for e in defined if callable(getattr(module, e))}
    assert constants_and_types <= set(listed), f"{name}: public and not in __all__"


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for each in module.__all__:
        value = getattr(module, each)
        if callable(value) and getattr(value, "__module__", None) == name:
            assert value.__doc__, f"{name}.{each} has no docstring"
