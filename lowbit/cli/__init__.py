"""The command line: one file a command. Heavy imports happen inside the commands, so that help costs nothing.

Exit codes: 0 done, 1 an error or a failed cell (said in words), 2 a command line that means nothing, 130 interrupted.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of ``lowbit``: errors of the tree become one clear message and exit code 1.

    Any other exception keeps its traceback: it is a defect, and hiding it would hide where.
    """
    from lowbit.cli.app import app
    from lowbit.errors import LowbitError

    try:
        app(prog_name="lowbit")
    except LowbitError as error:
        print(f"lowbit: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # typer makes 130 of an interrupt, without a word
            raise
        print("\nlowbit: interrupted; finished blocks and cells are kept, the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        _flush()


def _flush() -> None:
    """What is left in the buffer may find its reader gone (``lowbit ... | head``), which is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
