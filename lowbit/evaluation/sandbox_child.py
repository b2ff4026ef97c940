"""What runs generated code: limits are set, doors are closed, then the program. Started by sandbox.py, never imported.

    python -I sandbox_child.py PROGRAM SECONDS BYTES TOKEN

writes TOKEN to descriptor 3 once the program has run to its end; a program that exits early has not passed. Needs the
standard library only.
"""

import ctypes
import os
import resource
import sys

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # sched.h
REFUSED = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill",
           "ctypes.", "shutil.", "ftplib.", "http.", "urllib.", "webbrowser.", "pty.")  # fmt: skip


def without_network() -> bool:
    """Leave the network: an own, empty one. False where the system does not allow that."""
    try:
        return bool(ctypes.CDLL(None, use_errno=True).unshare(NEW_USER | NEW_NETWORK) == 0)
    except (OSError, AttributeError):
        return False


def limit(seconds: int, memory: int) -> None:
    """Hard limits, which the program cannot raise."""
    for kind, value in (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(kind, (value, value))


def refuse(event: str, _: object) -> None:
    """What a program for a test never needs."""
    if event.startswith(REFUSED):
        raise PermissionError(f"{event} is refused to generated code")


def main() -> None:
    program, seconds, memory, token = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if program == "--probe":
        os.write(3, b"network namespace" if without_network() else b"sockets refused")
        return
    with open(program, encoding="utf-8") as file:
        source = file.read()
    without_network()
    limit(seconds, memory)
    sys.argv[:] = ["program"]
    sys.addaudithook(refuse)
    exec(compile(source, "program", "exec"), {"__name__": "__main__"})
    os.write(3, token.encode())


if __name__ == "__main__":
    main()
