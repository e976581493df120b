"""The ``kgdbx`` program, also as ``python -m kgdbx``."""

import signal
import sys

__all__ = ("main",)


def main() -> int:
    """Run the program.

    :return: exit status
    """
    # What is imported takes a second on a busy machine; ^C ends that without a traceback. The
    # command that is run has a handler of its own.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    import kgdbx.cli

    return kgdbx.cli.main()


if __name__ == "__main__":
    sys.exit(main())
