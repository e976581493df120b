"""Load kgdbx into gdb: gdb -x gdb_scripts/kgdbx.py vmlinux."""

import sys
from pathlib import Path

# .venv is made with a Python of the same minor version as gdb's: see vm/host-setup.
_root = Path(__file__).resolve().parent.parent
_version = f"python{sys.version_info.major}.{sys.version_info.minor}"
_packages = _root / ".venv" / "lib" / _version / "site-packages"
for _path in (_packages, _root):
    if str(_path) not in sys.path:
        sys.path.append(str(_path))

try:
    import kgdbx.gdb.load
except ModuleNotFoundError as e:
    import gdb

    raise gdb.GdbError(
        f"kgdbx: no module {e.name!r} for gdb's {_version}; run 'make setup' in {_root}"
    ) from None

kgdbx.gdb.load.load()
