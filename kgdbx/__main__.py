"""``python -m kgdbx`` is ``kgdbx``."""

import sys

from kgdbx.cli import main

sys.exit(main())
