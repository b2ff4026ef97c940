"""The command line: one file a command. Heavy imports happen inside the commands, so that help costs nothing."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of ``lowbit``: errors of the tree become one clear message and exit code 1."""
    from lowbit.cli.app import app
    from lowbit.errors import LowbitError

    try:
        app(prog_name="lowbit")
    except LowbitError as error:
        print(f"lowbit: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("lowbit: interrupted; finished work is kept, the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
