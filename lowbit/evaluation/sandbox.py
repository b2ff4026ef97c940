"""Running generated code with its tests: in a process of its own, within limits, killed with all that it started.

The process gets an empty folder, an empty environment, hard limits of processor time, memory, file size, processes and
descriptors, and a limit of wall time. Where the system permits, it has process and network namespaces of its own, with
nothing else in them; else sockets are refused inside the interpreter. ``isolation`` says which. Refused inside the
interpreter, always, are starting processes, and writing, moving or removing files but for writing in its own folder.
Another process than the program's says whether it ran to its end. Malicious code can get around what the interpreter
refuses, and files can be read: this stops accidents and careless code. It is no prison: run what you do not trust at
all in a virtual machine.
"""

from __future__ import annotations

import contextlib
import os
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
_GRACE = 10.0  # seconds for what runs beside the program: an interpreter that starts, processes that are killed
_CHILD = Path(__file__).with_name("sandbox_child.py")


class Ran(NamedTuple):
    """Whether the program ran to its end, and how it ended: "passed", "failed", "timed out" or "killed"."""

    passed: bool
    how: str


def run(program: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> Ran:
    """Run a Python program; wall time of ``seconds``, ``memory`` bytes of address space.

    Raises EvidenceError where the system has no such limits (Windows).
    """
    with tempfile.TemporaryDirectory(prefix="lowbit-code-") as folder:
        path = Path(folder, "program")
        path.write_text(program, encoding="utf-8", errors="replace")
        how = _child(str(path), folder, seconds, memory)
    return Ran(how == "passed", how)


@cache
def isolation() -> str:
    """ "network namespace", or "sockets refused" where the system does not allow one."""
    with tempfile.TemporaryDirectory(prefix="lowbit-code-") as folder:
        return _child("--probe", folder, 0.0, 0)


def _child(program: str, folder: str, seconds: float, memory: int) -> str:
    """What the supervising process said; "killed" where it could not."""
    if sys.platform == "win32":
        raise EvidenceError("generated code is not run on Windows", where="sandbox", why="it has no such limits")
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_CHILD), str(writing), program, str(seconds), str(memory)],
            cwd=folder, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=(writing,), start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        os.close(reading)
        raise EvidenceError(f"no process can be started: {error.strerror}", where="sandbox") from error
    finally:
        os.close(writing)
    try:
        code: int | None = process.wait(seconds + _GRACE)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with os.fdopen(reading, "rb", buffering=0) as pipe:  # only the supervisor had the other end, and it has ended
        said = pipe.read(256).decode("ascii", "replace")
    return said if code == 0 and said else "timed out" if code is None else "killed"
