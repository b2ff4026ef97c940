"""Reads of both engines against the bytes of the files, and what happens when files end early."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lowbit.errors import StorageError
from lowbit.runtime.reader import PAGE, Buffer, Engine, Reader, disk_rate

ENGINES: list[Engine] = ["uring", "threads"]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    asked: Engine = request.param
    (tmp_path / "probe").write_bytes(b"x")
    try:
        Reader([tmp_path / "probe"], engine=asked).close()
    except StorageError:
        pytest.skip("this kernel refuses io_uring")
    return asked


def files(folder: Path) -> list[Path]:
    """Whole pages, a ragged end, and less than a page."""
    paths = []
    for i, size in enumerate((64 * PAGE, 37 * PAGE + 1234, 77)):
        path = folder / f"file{i}"
        path.write_bytes(random.Random(i).randbytes(size))
        paths.append(path)
    return paths


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("depth", "request_size"), [(1, PAGE), (3, 3 * PAGE), (16, 1 << 20)])
def test_what_arrives_is_what_is_there(
    tmp_path: Path, engine: Engine, direct: bool, depth: int, request_size: int
) -> None:
    paths = files(tmp_path)
    reader = Reader(paths, engine=engine, direct=direct, depth=depth, request=request_size)
    assert reader.engine == engine
    draw = random.Random(depth)
    flying = []
    for _ in range(40):
        file = draw.randrange(3)
        size = paths[file].stat().st_size
        offset = draw.randrange(-(-size // PAGE)) * PAGE
        length = draw.randint(1, size - offset)
        buffer = Buffer(length)
        flying.append((reader.submit(file, offset, length, buffer), paths[file], offset, length, buffer))
    draw.shuffle(flying)
    for ticket, path, offset, length, buffer in flying:
        reader.wait(ticket)
        assert buffer.bytes[:length].numpy().tobytes() == path.read_bytes()[offset : offset + length]
    reader.close()


def test_a_file_that_was_cut_short_is_named_and_others_go_on(tmp_path: Path, engine: Engine) -> None:
    first, second, _ = files(tmp_path)
    reader, whole = Reader([first, second], engine=engine, request=4 * PAGE), first.read_bytes()
    first.write_bytes(whole[: 10 * PAGE + 5])
    buffer, other = Buffer(len(whole)), Buffer(PAGE)
    ticket, fine = reader.submit(0, 0, len(whole), buffer), reader.submit(1, 0, PAGE, other)
    with pytest.raises(StorageError, match=rf"file0: cannot be read: ends at byte {10 * PAGE + 5}"):
        reader.wait(ticket)
    reader.wait(fine)
    reader.wait(reader.submit(0, 0, 10 * PAGE + 5, buffer))
    assert buffer.bytes[: 10 * PAGE + 5].numpy().tobytes() == whole[: 10 * PAGE + 5]
    first.write_bytes(whole)
    reader.wait(reader.submit(0, 0, len(whole), buffer))
    assert buffer.bytes.numpy().tobytes() == whole


def test_what_cannot_be_read_is_refused(tmp_path: Path, engine: Engine) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        Reader([tmp_path / "nowhere"], engine=engine)
    reader, buffer = Reader(files(tmp_path), engine=engine), Buffer(4 * PAGE)
    for file, offset, length in ((0, 100, PAGE), (3, 0, PAGE), (0, 0, 0), (0, 0, 5 * PAGE)):
        with pytest.raises(ValueError):  # noqa: PT011 - each has its own words
            reader.submit(file, offset, length, buffer)
    reader.close()
    with pytest.raises(StorageError, match="closed"):
        reader.submit(0, 0, PAGE, buffer)


def test_readers_and_buffers_may_go_while_reads_are_under_way(tmp_path: Path, engine: Engine) -> None:
    paths = files(tmp_path)
    for _ in range(30):
        reader = Reader(paths, engine=engine, depth=2, request=PAGE)
        for _ in range(3):
            reader.submit(0, 0, 64 * PAGE, Buffer(64 * PAGE))
        del reader
    assert disk_rate(paths, 0.01) > 0
