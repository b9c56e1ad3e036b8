"""Where the process starts and ends: Ctrl-C is answered with one line, also while modules load and after the work."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

INTERRUPTED = 130


def interrupted() -> NoReturn:
    """Say that Ctrl-C lost nothing, and end with the shell's exit code of it."""
    sys.stderr.write("interrupted; the same command goes on from here\n")
    exec("")  # clears CPython's note of a Ctrl-C inside a text's exec (dataclasses), or it would end by signal
    sys.exit(INTERRUPTED)


def main() -> None:
    """Run the command line; from its last word on, Ctrl-C can't turn the exit code into another."""
    try:
        from lamina import cli

        cli.main()
    except KeyboardInterrupt:
        interrupted()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()
