"""Memory limits for one process (cgroup v1, needs root), an empty page cache, and what a process has read.

RLIMIT_AS and RLIMIT_DATA do not count the page cache, so that a file smaller than the machine's memory would never be
read twice; a cgroup counts it. Standard library only: peers' interpreters import this, too.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup/memory/lowbit-streaming")
LIMIT = "memory.limit_in_bytes"


def group(limit: int | None = None) -> Path:
    """A new cgroup, empty; ``limit`` in bytes."""
    CGROUP.mkdir(exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=CGROUP))
    if limit is not None:
        (made / LIMIT).write_text(str(limit))
    return made


def inside(group: Path, command: list[str]) -> list[str]:
    """The command, run as a process that is in the group before it begins."""
    return ["sh", "-c", f'echo $$ > {group}/tasks; exec "$@"', "sh", *command]


def number(group: Path, name: str) -> int:
    return int((group / name).read_text())


def remove(group: Path) -> None:
    """Once its processes have ended: what it still holds of the page cache is dropped."""
    (group / "memory.force_empty").write_text("0")
    group.rmdir()


def weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".gguf"))


def drop_cache(folder: Path) -> None:
    """What is in the page cache already is free for everybody, whatever the limit of a group."""
    for path in weight_files(folder):
        with path.open("rb") as f:
            os.fsync(f.fileno())  # what is not yet on the disk cannot be dropped
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes() -> int:
    """What this process has had the disk read."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])
