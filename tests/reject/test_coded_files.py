"""Coded files that are not to be believed: each is one CheckpointError, and what a tensor is wrong in names it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from damage import SMALL, Change, Parts, V, W, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit.codec.container import Reader
from lowbit.codec.header import CODED_CRC, REST
from lowbit.errors import CheckpointError
from lowbit.io.compress import decompress


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole coded file; read only."""
    return make(tmp_path_factory.mktemp("coded"))


def read_whole(path: Path) -> dict[str, bytes]:
    with Reader(path) as reader:
        found = {name: data.tobytes() for name, data in reader.read_all(workers=1)}
        reader.check_padding()
    return found


def test_a_whole_file_is_read(coded: Path, tmp_path: Path) -> None:
    assert set(read_whole(coded)) == {W, V, SMALL}
    Parts(coded).write(tmp_path / "same.safetensors")  # what follows changes what this leaves as it is
    assert read_whole(tmp_path / "same.safetensors") == read_whole(coded)


def test_no_flipped_bit_goes_unnoticed(coded: Path, tmp_path: Path) -> None:
    whole, path = coded.read_bytes(), tmp_path / "flipped.safetensors"
    draw = random.Random(0)
    held = 8 + len(whole[8 : 8 + int.from_bytes(whole[:8], "little")].rstrip())
    places = [*range(12), *draw.sample(range(8, held), 60), *draw.sample(range(held, len(whole)), 80)]
    for at in places:
        data = bytearray(whole)
        data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            read_whole(path)


@pytest.mark.parametrize("name", [W, V, SMALL])
def test_a_flipped_byte_names_its_tensor(coded: Path, tmp_path: Path, name: str) -> None:
    with Reader(coded) as reader:
        at = reader.begin + reader.entries[name].begin + 3
    data = bytearray(coded.read_bytes())
    data[at] ^= 0x10
    (tmp_path / "x.safetensors").write_bytes(data)
    with Reader(tmp_path / "x.safetensors") as reader:
        for other in {W, V, SMALL} - {name}:
            reader.read(other)
        with pytest.raises(CheckpointError, match=rf"x\.safetensors: {name}: its bytes do not have their checksum"):
            reader.read(name)
    with pytest.raises(CheckpointError, match=name):
        decompress(tmp_path / "x.safetensors", tmp_path / "back.safetensors")
    assert not (tmp_path / "back.safetensors").exists()


def test_every_truncation_is_refused(coded: Path, tmp_path: Path) -> None:
    whole = coded.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, 4095, 4096, 4097, len(whole) // 2, len(whole) - 8, len(whole) - 1]:
        (tmp_path / "short.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"short\.safetensors: cannot be read"):
            Reader(tmp_path / "short.safetensors")
    (tmp_path / "long.safetensors").write_bytes(whole + bytes(8))
    with pytest.raises(CheckpointError):
        Reader(tmp_path / "long.safetensors")


def absurd_shape(parts: Parts) -> None:
    parts.of(W).update(shape=[1 << 39, 16], bytes=1 << 44)


def constant_bomb(parts: Parts) -> None:
    """A terabyte of zeros in one byte."""
    parts.of(W).update(dtype="U8", shape=[1 << 40], bytes=1 << 40, layout="bytes", fields=[["constant", 0, 1, 1 << 40]])
    parts.coded["bytes"] = (1 << 40) + 4096


def inflated_rest(parts: Parts) -> None:
    parts.coded["rest"][0] += 1
    parts.coded["bytes"] += 1


def other_rest(parts: Parts) -> None:
    place = parts.bytes_of(REST)
    parts.data[place] = bytes(place.stop - place.start)
    parts.sign(REST)


def swapped_extents(parts: Parts) -> None:
    parts.coded["extents"] = parts.coded["extents"][::-1]


def overlapping(parts: Parts) -> None:
    parts.of(V)["at"] = parts.of(W)["at"] + 16


def garbage_stream(parts: Parts) -> None:
    codec, begin, length, _ = parts.of(W)["fields"][0]
    assert codec == "tans"
    start = parts.bytes_of(W).start + begin
    parts.data[start : start + length] = bytes(range(256)) * (length // 256) + bytes(length % 256)
    parts.sign(W)


def other_stream(parts: Parts) -> None:
    """The stream of fewer codes than are said to be there."""
    parts.of(W)["shape"] = [32, 256]
    parts.of(W)["bytes"] //= 2
    for field in parts.of(W)["fields"]:
        field[3] //= 2
    parts.coded["bytes"] -= parts.of(W)["bytes"]


CORPUS: list[tuple[Change, str]] = [
    (lambda p: p.coded.update(version=2), r"version is 2, this lowbit reads 1"),
    (lambda p: p.coded.pop("version"), r"the header is malformed"),
    (lambda p: p.coded.update(kind="pickle"), r"unknown kind of file 'pickle'"),
    (lambda p: p.of(W)["fields"][0].__setitem__(0, "zstd"), rf"{W}: unknown codec 'zstd'"),
    (lambda p: p.of(W).update(layout="bf17"), r"unknown layout 'bf17'"),
    (lambda p: p.of(W).update(layout="bytes"), rf"{W}: fields of"),
    (absurd_shape, r"larger than any tensor|is no size"),
    (constant_bomb, rf"{W}: 1099511627776 codes in 1 bytes"),
    (lambda p: p.of(W).update(shape=[-16, -128]), r"-16 is no size"),
    (lambda p: p.of(W).update(shape=[1 << 41]), r"is no size"),
    (lambda p: p.of(W).update(shape=[64, 257]), rf"{W}: 32768 bytes are not BF16"),
    (lambda p: p.of(W).update(bytes=-1), r"-1 is no size"),
    (lambda p: p.of(W).update(bytes=True), r"True is no size"),
    (lambda p: p.of(W).update(bytes=4096.0), r"4096.0 is no size"),
    (lambda p: p.of(W).update(dtype="F8_E4M3"), rf"{W}: 32768 bytes are not F8_E4M3"),
    (lambda p: p.of(W).update(dtype=3), rf"{W}: 3 of shape"),
    (lambda p: p.of(W)["fields"].pop(), rf"{W}: fields of"),
    (lambda p: p.of(W)["fields"][1].__setitem__(1, 0), rf"{W}: a field at 0, expected at"),
    (lambda p: p.of(W)["fields"][1].__setitem__(2, 1 << 30), rf"{W}: fields end at"),
    (lambda p: p.of(W)["fields"][0].__setitem__(3, 1 << 30), rf"{W}: fields of"),
    (lambda p: p.of(W).pop("crc"), r"malformed: KeyError\('crc'\)"),
    (lambda p: p.of(W).update(crc=0), rf"{W}: its bytes do not have their checksum"),
    (lambda p: p.of(W).update(at=0), r"overlaps|the parts are not"),
    (overlapping, rf"{V}: overlaps another tensor in the original|{W}: overlaps"),
    (lambda p: p.of(W).update(at=1 << 39), r"the parts are not the \d+ bytes"),
    (lambda p: p.of(SMALL).update(dtype="I32"), rf"{SMALL}: is stored as F32"),
    (lambda p: p.of(SMALL).update(shape=[4, 2]), rf"{SMALL}: is stored as F32 \[8\]"),
    (lambda p: p.coded["tensors"].pop(W), rf"the tensor '{W}' is in one of the two tables only"),
    (lambda p: p.coded["tensors"].update(x=p.of(W)), r"the tensor 'x' is in one of the two tables only"),
    (lambda p: p.table.pop(SMALL), r"cannot be read"),
    (lambda p: p.coded.update(extents=[0, 100]), r"extents do not begin at multiples of 4096"),
    (swapped_extents, r"extents are not in order"),
    (lambda p: p.coded.update(bytes=1 << 41), r"is no size"),
    (lambda p: p.coded.update(bytes=0), r"the parts are not the 0 bytes"),
    (inflated_rest, rf"{REST} does not hold the \d+ bytes"),
    (other_rest, rf"{REST}: "),
    (lambda p: p.coded.update(rest=[1 << 30, 0]), r"is no size"),
    (garbage_stream, rf"{W}: "),
    (lambda p: p.coded.update(tensors=[]), r"malformed"),
    (lambda p: p.coded.update(tensors={W: None}), r"one of the two tables|malformed"),
]


@pytest.mark.parametrize("case", [c for c in CORPUS if c[1]], ids=lambda case: case[1][:40])
def test_what_a_header_may_not_say(coded: Path, tmp_path: Path, case: tuple[Change, str]) -> None:
    change, message = case
    parts, path = Parts(coded), tmp_path / "x.safetensors"
    change(parts)
    parts.write(path)
    with pytest.raises(CheckpointError, match=message):
        read_whole(path)


def test_a_stream_of_other_codes_is_refused(coded: Path, tmp_path: Path) -> None:
    parts = Parts(coded)
    other_stream(parts)
    parts.write(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError):
        read_whole(tmp_path / "x.safetensors")


def test_the_original_header_must_say_the_same(coded: Path, tmp_path: Path) -> None:
    """Else a file would be one model compressed and another decompressed."""
    parts = Parts(coded)
    parts.of(W)["dtype"] = "I16"
    parts.write(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=rf"the original header is malformed: {W} is another tensor there"):
        Reader(tmp_path / "x.safetensors")


def test_padding_is_zero(coded: Path, tmp_path: Path) -> None:
    parts = Parts(coded)
    pad = next(name for name in parts.table if name.startswith("lowbit.pad.") and name != "lowbit.pad.0")
    parts.data[parts.bytes_of(pad).start] = 1
    parts.write(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=rf"{pad}: padding is not zero"):
        decompress(tmp_path / "x.safetensors", tmp_path / "back.safetensors")


def test_names_are_there_once(coded: Path, tmp_path: Path) -> None:
    parts = Parts(coded)
    text = json.dumps(parts.coded)
    parts.write(tmp_path / "x.safetensors", text.replace('"version": 1', '"version": 1, "version": 1'))
    with pytest.raises(CheckpointError, match="a name is there twice"):
        Reader(tmp_path / "x.safetensors")


def test_the_table_has_a_checksum(coded: Path, tmp_path: Path) -> None:
    whole = coded.read_bytes()
    parts = Parts(coded)
    assert whole.count(parts.metadata[CODED_CRC].encode()) == 1
    crc = parts.metadata[CODED_CRC].encode()
    (tmp_path / "x.safetensors").write_bytes(whole.replace(crc, crc[::-1] if crc != crc[::-1] else b"00000000"))
    with pytest.raises(CheckpointError, match="the header does not have its checksum"):
        Reader(tmp_path / "x.safetensors")


SIMPLE = st.none() | st.booleans() | st.integers(-5, 1 << 45) | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    SIMPLE, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner), max_leaves=6
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSON)
def test_nothing_but_a_checkpoint_error(coded: Path, tmp_path: Path, data: st.DataObject, value: object) -> None:
    """Any value in place of any other of the table: read as before, or refused as what it is."""
    parts = Parts(coded)
    held: object = parts.coded
    for _ in range(data.draw(st.integers(1, 4))):
        if isinstance(held, dict) and held:
            container, key = held, data.draw(st.sampled_from(sorted(held)))
        elif isinstance(held, list) and held:
            container, key = held, data.draw(st.integers(0, len(held) - 1))
        else:
            break
        held = container[key]
    container[key] = value
    parts.write(tmp_path / "x.safetensors")
    try:
        found = read_whole(tmp_path / "x.safetensors")
    except CheckpointError:
        return
    assert found == read_whole(coded)
