"""Whole files and directories in the coded form of ``lowbit.codec.container``, and back: every byte as it was.

A safetensors or GGUF file becomes one coded file. A directory becomes a directory of the same names in which those
files are coded and all others are copied, so that it stays what it was to every reader that knows the container: a
Hugging Face model, or a native checkpoint whose manifest still holds (its digests are those of the decoded shards).

What was written is decoded again and compared by sha256 before it appears under its name.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lowbit import digest
from lowbit.codec.container import Reader, is_coded
from lowbit.codec.header import Entry
from lowbit.codec.identity import decode_and_hash
from lowbit.codec.writing import Writer
from lowbit.errors import CheckpointError, ModelError, StorageError
from lowbit.io.plain import open_plain
from lowbit.io.storage import LOCK, NOTHING_LEFT, Lock, partial_file, storage

Progress = Callable[[str, int, int, str], None]
"""Called with a task, what is done, of how much, and the unit."""
_CODED = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Done:
    """One file: bytes before and after, and what became of its tensors (none for a file that was copied)."""

    name: str
    before: int
    after: int
    entries: tuple[Entry, ...] = ()


def compress(path: Path, out: Path, progress: Progress = lambda *_: None) -> list[Done]:
    """Compress a file or a directory into ``out``, which must not exist.

    Memory: a few times the largest tensor. Time: coding and decoding every byte once. Raises ModelError for what is no
    checkpoint or compressed already, StorageError for the disk, CheckpointError if a result did not decode to its
    source.
    """
    return _each(path, out, _compress_file, progress, "compressed")


def decompress(path: Path, out: Path, progress: Progress = lambda *_: None) -> list[Done]:
    """The inverse: the very files that were compressed. Raises CheckpointError for damaged ones."""
    return _each(path, out, _decompress_file, progress, "decompressed")


def coded_files(path: Path) -> list[Path]:
    """The coded files that a file or directory holds."""
    return [file for file in _files(path) if file.suffix in _CODED and is_coded(file)]


_OneFile = Callable[[Path, Path, Callable[[int], None]], Done | None]


def _each(path: Path, out: Path, one: _OneFile, progress: Progress, what: str) -> list[Done]:
    if not path.exists():
        raise ModelError("does not exist", where=str(path), fix="a safetensors or GGUF file, or a model directory")
    if out.exists():
        raise StorageError("exists already", where=str(out), why="nothing is overwritten", fix="another -o")
    files = _files(path)
    total, reached, found = sum(file.stat().st_size for file in files), 0, []
    changed = False
    with storage(out, NOTHING_LEFT), _appearing(path, out) as target:
        for file in files:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            at = target / name if path.is_dir() else target
            at.parent.mkdir(parents=True, exist_ok=True)
            done = None
            if file.suffix in _CODED or path == file:
                done = one(file, at, _Moved(progress, what, reached, total))
            changed |= done is not None
            if done is None:  # also where coding would have made it larger
                shutil.copyfile(file, at)
                done = Done(name, file.stat().st_size, file.stat().st_size)
            found.append(Done(name, done.before, done.after, done.entries))
            reached += file.stat().st_size
        if not changed:
            raise ModelError(
                f"holds nothing that could be {what}", where=str(path),
                why="no file in it " + ("would get smaller" if what == "compressed" else "is a coded one"),
                fix="use it as it is",
            )  # fmt: skip
    return found


@dataclass(frozen=True)
class _Moved:
    """Progress within one file, told as progress of all."""

    progress: Progress
    task: str
    before: int
    total: int

    def __call__(self, nbytes: int) -> None:
        self.progress(self.task, (self.before + nbytes) // 1_000_000, self.total // 1_000_000, "MB")


def _files(path: Path) -> list[Path]:
    """Regular files below a directory, or the file itself; hidden ones and those of a lock or a killed run are not."""
    if not path.is_dir():
        return [path]
    inside = (p for p in path.rglob("*") if p.is_file() and p.name != LOCK and p.suffix not in (".partial", ".spool"))
    return sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts))


@contextmanager
def _appearing(path: Path, out: Path) -> Iterator[Path]:
    """Where to write ``out``: it appears whole under its name when the body is done."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_dir():
        with partial_file(out) as partial:
            yield partial
        return
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(exist_ok=True)
    lock = Lock(partial)
    try:
        for left in partial.iterdir():  # of a killed run
            if left.name != LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        lock.release()
    partial.rename(out)


def _compress_file(path: Path, target: Path, moved: Callable[[int], None]) -> Done | None:
    if is_coded(path):
        raise ModelError("is compressed already", where=str(path), fix="use it as it is, or lowbit decompress")
    with open_plain(path) as plain, Writer(target, plain.kind) as writer:
        writer.rest(plain.rest())
        block: int | None = None
        done = 0
        for name in execution_order(plain.tensors):
            tensor = plain.tensors[name]
            now = block_of(name)
            writer.add(name, tensor.dtype, tensor.shape, tensor.at, plain.read(name), new_extent=now != block)
            block, done = now, done + tensor.nbytes
            moved(done)
        sha256 = digest.of_file(path)
        writer.finish(plain.nbytes, sha256)
        entries = tuple(writer.entries)
    if (found := decode_and_hash(target)) != sha256:
        raise CheckpointError(
            f"decodes to {digest.short(found)}, not to its source {digest.short(sha256)}", where=str(target),
            why="the source changed while it was read, or memory failed", fix="the same command again",
        )  # fmt: skip
    if target.stat().st_size >= path.stat().st_size:
        return None
    return Done(path.name, path.stat().st_size, target.stat().st_size, entries)


def _decompress_file(path: Path, target: Path, moved: Callable[[int], None]) -> Done | None:
    if not is_coded(path):
        return None
    hashed = hashlib.sha256()
    with Reader(path) as reader, target.open("wb") as out:
        reader.check_padding()
        before, entries = path.stat().st_size, tuple(reader.entries.values())
        done = 0
        for piece in reader.plain():
            out.write(piece.data)
            hashed.update(piece.data)
            done += piece.size
            moved(done * before // max(1, reader.header.nbytes))
        expected, after = reader.header.sha256, reader.header.nbytes
    if hashed.hexdigest() != expected:
        raise CheckpointError("the decoded file does not have its sha256", where=str(path), why="it was altered")
    return Done(path.name, before, after, entries)


def execution_order(names: Iterable[str]) -> list[str]:
    """Names in the order in which a forward pass uses them, as far as names tell; others in the order given.

    Embeddings, then the blocks by number and in them the order of use, then the final norm and the head.
    """
    return sorted(names, key=_rank)


def block_of(name: str) -> int | None:
    """The number of the block that a tensor belongs to; None outside of blocks."""
    match = _BLOCK.search(name)
    return int(match[1]) if match else None


def _rank(name: str) -> tuple[int, int, int, int]:
    block = block_of(name)
    if block is None:
        last = next((i for i, pattern in enumerate(_LAST, 1) if re.search(pattern, name)), 0)
        return (2 if last else 0, last, 0, 0)
    rank = next((i for i, pattern in enumerate(_ORDER) if re.search(pattern, name)), len(_ORDER))
    expert = re.search(r"experts\.(\d+)\.", name)
    return (1, block, len(_ORDER), int(expert[1])) if expert else (1, block, rank, 0)


_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|blk|layer)\.(\d+)\.")
_LAST = (r"(^|\.)(final_)?(layer_?)?norm\b|final_layer_norm|ln_f|output_norm", r"lm_head|embed_out|^output\.")
_ORDER = (
    r"input_layernorm|attn_norm|ln_1|ln_attn|self_attn_layer_norm", r"q_proj|attn_q\b|query_key_value|c_attn|attn_qkv",
    r"q_norm", r"k_proj|attn_k\b", r"k_norm", r"v_proj|attn_v\b",
    r"o_proj|out_proj|attn_output|attention\.dense|attn\.c_proj",
    r"post_attention_layernorm|ffn_norm|ln_2|ln_mlp", r"router|gate\.weight|ffn_gate_inp",
    r"gate_proj|gate_up_proj|ffn_gate|fc1|w1\b|h_to_4h|c_fc",
    r"up_proj|ffn_up|w3\b", r"down_proj|ffn_down|fc2|w2\b|4h_to_h|mlp\.c_proj",
)  # fmt: skip
