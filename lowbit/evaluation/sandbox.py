"""Running generated code with its tests: in a process of its own, without network, within limits, killed as a group.

The process gets an empty folder, an empty environment, hard limits of processor time, memory, file size, processes and
descriptors, and a limit of wall time. Where the system permits, it has a network namespace of its own, with nothing in
it; else sockets are refused inside the interpreter, which malicious code could get around. ``isolation`` says which.
This stops accidents and careless code. It is no prison: run what you do not trust at all in a virtual machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lowbit.errors import EvidenceError

SECONDS = 5.0
MEMORY = 1 << 30
_CHILD = Path(__file__).with_name("sandbox_child.py")


class Ran(NamedTuple):
    """Whether the program ran to its end, and how it ended: "passed", "failed", "timed out" or "killed"."""

    passed: bool
    how: str


def run(program: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> Ran:
    """Run a Python program; wall time of ``seconds``, ``memory`` bytes of address space.

    Raises EvidenceError where the system has no such limits (Windows).
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="lowbit-code-") as folder:
        path = Path(folder, "program")
        path.write_text(program, encoding="utf-8", errors="replace")
        said, how = _child([str(path), str(int(seconds) + 1), str(memory), token], folder, seconds)
    passed = said == token
    return Ran(passed, "passed" if passed else how)


@cache
def isolation() -> str:
    """ "network namespace", or "sockets refused" where the system does not allow one."""
    with tempfile.TemporaryDirectory(prefix="lowbit-code-") as folder:
        return _child(["--probe", "1", "1", ""], folder, 10.0)[0]


def _child(arguments: list[str], folder: str, seconds: float) -> tuple[str, str]:
    """What the child wrote to its descriptor 3, and how it ended without."""
    if sys.platform == "win32":
        raise EvidenceError("generated code is not run on Windows", where="sandbox", why="it has no such limits")
    reading, writing = os.pipe()
    try:
        # a shell-free way to make the pipe descriptor 3 in the child, and no other one
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _START, str(writing), str(_CHILD), *arguments], cwd=folder, env={},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=(writing,), start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        os.close(reading)
        raise EvidenceError(f"no process can be started: {error.strerror}", where="sandbox") from error
    finally:
        os.close(writing)
    try:
        code: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    os.set_blocking(reading, False)
    try:
        said = os.read(reading, 256).decode("ascii", "replace")
    except BlockingIOError:  # a process that left the group still holds the other end
        said = ""
    finally:
        os.close(reading)
    return said, "timed out" if code is None else "killed" if code < 0 else "failed"


_START = (
    "import os, runpy, sys; fd = int(sys.argv[1]); os.dup2(fd, 3); fd == 3 or os.close(fd); "
    "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)
