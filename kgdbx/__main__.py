"""The ``kgdbx`` program, also as ``python -m kgdbx``."""

import signal
import sys

__all__ = ("main",)


def main() -> int:
    """Run the program.

    :return: exit status
    """
    # What is imported takes a second on a busy machine; ^C ends that without a traceback.
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    import kgdbx.cli

    signal.signal(signal.SIGINT, handler)
    return kgdbx.cli.main()


if __name__ == "__main__":
    sys.exit(main())
