"""What runs generated code: a supervisor, and the program in a process forked from it. Never imported.

    python -I sandbox_child.py DESCRIPTOR PROGRAM SECONDS BYTES

writes "passed", "failed", "timed out" or "killed" to the descriptor, which the program's process does not have: a
program cannot speak for itself. It passes by running to its end; leaving early is a failure. When it has ended, all
that it started is killed. Needs the standard library only.
"""

import os
import posix
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000  # sched.h
SUBREAPER = 36  # sys/prctl.h
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill",
          "ctypes.", "ftplib.", "http.", "urllib.", "webbrowser.", "pty.",
          "shutil.", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown",
          "os.truncate", "os.utime", "os.setxattr", "os.removexattr", "os.chdir", "os.fchdir",
          "sqlite3.")  # fmt: skip
MODULES = ("_posixsubprocess", "subprocess", "multiprocessing", "_multiprocessing", "ctypes", "_ctypes",
           "_dbm", "_gdbm")  # fmt: skip


def isolate() -> bool:
    """Processes and a network of one's own for what is forked next. False where the system does not allow that.

    Whatever it leaves behind becomes this process's child, so that it can be found; the system kills it anyway where
    processes are apart.
    """
    import ctypes

    with suppress(OSError, AttributeError):
        system = ctypes.CDLL(None, use_errno=True)
        system.prctl(SUBREAPER, 1, 0, 0, 0)
        return bool(system.unshare(NEW_USER | NEW_PROCESSES | NEW_NETWORK) == 0)
    return False


def limit(seconds: int, memory: int) -> None:
    """Hard limits, which the program cannot raise. That of processes does not bind root."""
    for kind, value in (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(kind, (value, value))


def refusing(folder: str) -> Callable[[str, tuple[object, ...]], None]:
    """An audit hook against what a program for a test never needs; it may write files of its own folder."""

    def outside(path: object) -> bool:
        whole = os.path.realpath(os.path.join(folder, os.fsdecode(path)))  # type: ignore[arg-type]
        return not whole.startswith(folder + os.sep)

    def refuse(event: str, details: tuple[object, ...]) -> None:
        if event == "import" and str(details[0]).partition(".")[0] in MODULES:
            raise ImportError(f"{details[0]} is refused to generated code")
        if event == "open" and not isinstance(details[0], int):
            path, _, flags = details
            # a folder's descriptor would lead a relative path elsewhere, which the event does not tell
            if (isinstance(flags, int) and flags & WRITES and outside(path)) or os.path.isdir(path):  # type: ignore[arg-type]
                raise PermissionError("opening this is refused to generated code")
        if event.startswith(EVENTS):
            raise PermissionError(f"{event} is refused to generated code")

    return refuse


def leave(status: int) -> None:
    """In the place of os._exit, which would end a program before its tests as if it had passed them."""
    raise SystemExit(1)


def work(source: str, ends: type[BaseException] = BaseException, early: type[BaseException] = SystemExit) -> None:
    """Run the program; returns where it ran to its end. The names are bound before the program can change them."""
    try:
        exec(compile(source, "program", "exec"), {"__name__": "__main__"})
    except ends:
        raise early(1) from None


def children() -> list[int]:
    """Processes whose parent is this one, from /proc; none where there is no /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended since
            if int(stat.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def supervise(program: int, seconds: float) -> str:
    """Wait for the program's process, kill what it leaves, and say how it ended."""
    late = False

    def stop(*_: object) -> None:
        nonlocal late
        late = True
        with suppress(ProcessLookupError):  # it has ended just now
            os.kill(program, signal.SIGKILL)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    signal.setitimer(signal.ITIMER_REAL, 0)
    while left := children():
        for process in left:
            os.kill(process, signal.SIGKILL)
        os.waitpid(-1, 0)
    return "timed out" if late else "passed" if status == 0 else "killed" if status < 0 else "failed"


def main() -> None:
    report, program, seconds, memory = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    if program == "--probe":
        os.write(report, b"network namespace" if isolate() else b"sockets refused")
        return
    source = Path(program).read_text(encoding="utf-8")
    isolate()
    process = os.fork()
    if process:
        os.write(report, supervise(process, seconds).encode())
        return
    os.close(report)
    folder = os.path.realpath(os.getcwd())
    limit(int(seconds) + 1, memory)
    sys.argv[:] = ["program"]
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[name]
    os._exit = posix._exit = leave  # type: ignore[assignment]
    sys.addaudithook(refusing(folder))
    work(source)


if __name__ == "__main__":
    main()
