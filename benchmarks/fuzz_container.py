"""Fuzz the reader of coded files: damaged and made-up files must be refused, never crash, hang or take memory.

    python benchmarks/fuzz_container.py --seconds 300 --seed 0

Three kinds of mutants of small coded files, in turn: bytes flipped, cut and copied anywhere; stored bytes altered under
checksums that agree (so that the coder's native decoder sees them); values of the table replaced under checksums that
agree. A mutant must be read, or refused with CheckpointError, within a second and 256 MB. The seed of the mutant under
test is in ``--last``, which survives a crash of the process. ``--atheris FOLDER``, where atheris is installed, lets the
coverage of ``lowbit.codec`` guide mutations of header and data, under checksums that agree.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from safetensors.torch import save_file

from lowbit.codec.checksum import crc32c
from lowbit.codec.container import Reader
from lowbit.codec.header import CODED, CODED_CRC, signed
from lowbit.errors import CheckpointError
from lowbit.io.compress import compress

SLOW_S, LARGE = 1.0, 256 << 20


def seeds(folder: Path) -> list[bytes]:
    """Small coded files with every codec."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(96, 256, generator=g)
    codes = (w * 3 + 8).round().clamp(0, 15).to(torch.uint8)
    few = torch.tensor([0, 90, 180, 255], dtype=torch.uint8)[
        torch.randint(0, 4, (3000,), generator=g).square() // 3 % 4
    ]
    tensors = {
        "model.layers.0.a": w.bfloat16(), "model.layers.0.b": w.half(), "model.layers.1.c": w,
        "model.layers.1.d": codes[:, ::2] | codes[:, 1::2] << 4, "model.layers.1.e": (w * 20).round().to(torch.int8),
        "few": few, "zeros": torch.zeros(4000), "index": torch.arange(600),
    }  # fmt: skip
    files = []
    for i, names in enumerate([list(tensors), ["model.layers.0.a"], ["few", "model.layers.1.c"]]):
        save_file({name: tensors[name] for name in names}, folder / f"{i}.safetensors")
        compress(folder / f"{i}.safetensors", folder / f"{i}-coded.safetensors")
        files.append((folder / f"{i}-coded.safetensors").read_bytes())
    return files


def mutate_bytes(data: bytearray, draw: random.Random) -> None:
    """A few flips, cuts, copies and extreme numbers anywhere."""
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(data))
        kind = draw.randrange(5)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind == 2:
            size = draw.randint(1, 64)
            source = draw.randrange(len(data))
            data[at : at + size] = data[source : source + size]
        elif kind == 3:
            data[at : at + 4] = draw.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"))
        elif draw.random() < 0.2:
            del data[at:]
            return


def split(whole: bytes) -> tuple[dict[str, Any], bytearray]:
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), bytearray(whole[8 + length :])


def join(table: dict[str, Any], coded: Any, data: bytes) -> bytes:
    """A file whose header has the checksum that it should."""
    table["__metadata__"] |= {CODED: json.dumps(coded), CODED_CRC: "00000000"}
    text = json.dumps(table, separators=(",", ":")).encode()
    text = signed(text.ljust(-(-(8 + len(text)) // 4096) * 4096 - 8))
    return len(text).to_bytes(8, "little") + text + data


def with_other_contents(whole: bytes, draw: random.Random) -> bytes:
    table, data = split(whole)
    coded = json.loads(table["__metadata__"][CODED])
    names = [*coded["tensors"], "lowbit.rest"]
    for name in draw.sample(names, min(len(names), draw.randint(1, 2))):
        begin, end = table[name]["data_offsets"]
        part = data[begin:end]
        if not part:
            continue
        mutate_bytes(part, draw)
        part = part[: end - begin].ljust(end - begin, b"\0")
        data[begin:end] = part
        if name == "lowbit.rest":
            coded["rest"][1] = crc32c(bytes(part))
        else:
            coded["tensors"][name]["crc"] = crc32c(bytes(part))
    return join(table, coded, bytes(data))


def with_other_table(whole: bytes, draw: random.Random) -> bytes:
    table, data = split(whole)
    coded = json.loads(table["__metadata__"][CODED])
    held: Any = coded if draw.random() < 0.8 else {k: v for k, v in table.items() if k != "__metadata__"}
    container, key = held, None
    while isinstance(held, dict | list) and held and (key is None or draw.random() < 0.8):
        container = held
        key = draw.choice(list(held)) if isinstance(held, dict) else draw.randrange(len(held))
        held = container[key]
    extremes = [0, 1, -1, 7, 8, 64, 4095, 4096, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, 1.5, None, True, "",
                [], {}, "bytes", "packed-4", "trits", "raw", "tans", "ranked", "constant", "F4", "U8"]  # fmt: skip
    if isinstance(held, int) and draw.random() < 0.5:
        container[key] = held + draw.choice((-4096, -64, -8, -1, 1, 8, 64, 4096))
    else:
        container[key] = draw.choice(extremes)
    return join(table, coded, bytes(data))


def check(path: Path) -> str:
    """Read everything of a file: ``read``, ``refused``, or what should not have happened."""
    try:
        with Reader(path) as reader:
            if reader.header.nbytes > LARGE:
                return "refused"  # sizes are stated: a caller may decline before anything is allocated
            for name in reader.keys():  # noqa: SIM118
                reader.read(name)
            for _ in reader.plain(workers=1):
                pass
            reader.check_padding()
    except CheckpointError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def run(seconds: float, first: int, last: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, path = seeds(folder), folder / "mutant.safetensors"
        before, seed, end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, first, time.monotonic() + seconds
        while time.monotonic() < end:
            draw = random.Random(seed)
            last.write_text(str(seed))
            whole = draw.choice(files)
            kind = ("bytes", "contents", "table")[seed % 3]
            if kind == "bytes":
                data = bytearray(whole)
                mutate_bytes(data, draw)
                path.write_bytes(data)
            else:
                path.write_bytes((with_other_contents if kind == "contents" else with_other_table)(whole, draw))
            started = time.monotonic()
            outcome = check(path)
            taken = time.monotonic() - started
            grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            if taken > SLOW_S:
                found["slow"] += 1
                print(f"seed {seed}: {taken:.1f} s", flush=True)
            if grown > 2 * LARGE:
                print(f"seed {seed}: memory grew by {grown >> 20} MB", flush=True)
                return found
            if kind == "bytes" and outcome == "read" and path.read_bytes() != whole:
                outcome = "an altered file was read"
            found[f"{kind} {outcome if outcome in ('read', 'refused') else 'FINDING'}"] += 1
            if outcome not in ("read", "refused"):
                print(f"seed {seed}, {kind}: {outcome}", flush=True)
            seed += 1
    return found


def with_atheris(seconds: float, folder: Path) -> None:
    """Coverage of lowbit.codec guides what is mutated: the JSON of the header and the data, checksums made right again.

    Does not return: libFuzzer ends the process. ``folder`` keeps the corpus it has grown, and inputs that fail.
    """
    import atheris

    for function in _functions("lowbit.codec"):
        atheris.instrument_func(function)
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        for i, whole in enumerate(seeds(Path(name))):
            table, data = split(whole)
            coded = json.loads(table["__metadata__"].pop(CODED))
            (corpus / f"seed-{i}").write_bytes(_BETWEEN.join([_json(table), _json(coded), bytes(data)]))
    words = folder / "words"
    words.write_text("".join(f'"{word}"\n' for word in _WORDS))
    path = folder / "mutant.safetensors"

    def one(data: bytes) -> None:
        path.write_bytes(assembled(data))
        outcome = check(path)
        if outcome not in ("read", "refused"):
            raise RuntimeError(outcome)

    limits = [f"-max_total_time={int(seconds)}", "-max_len=250000", "-timeout=5", "-rss_limit_mb=3000"]
    options = [f"-dict={words}", f"-artifact_prefix={folder}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], str(corpus), *limits, *options], one)
    atheris.Fuzz()


def assembled(data: bytes) -> bytes:
    """The file that a fuzzer's input stands for: two JSON texts and data; anything else is a file as it is."""
    parts = data.split(_BETWEEN, 2)
    try:
        table, coded = json.loads(parts[0]), json.loads(parts[1])
        held = parts[2]
        for name in [*coded["tensors"], "lowbit.rest"]:
            begin, end = table[name]["data_offsets"]
            if name == "lowbit.rest":
                coded["rest"][1] = crc32c(held[begin:end])
            else:
                coded["tensors"][name]["crc"] = crc32c(held[begin:end])
        return join(table, coded, held)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return data


def _functions(package: str) -> list[FunctionType]:
    """The functions and methods of a package's modules."""
    modules = [m for name, m in sorted(sys.modules.items()) if name.startswith(f"{package}.")]
    found = []
    for module in modules:
        own = [v for v in vars(module).values() if getattr(v, "__module__", None) == module.__name__]
        held = [*own, *(v for c in own if isinstance(c, type) for v in vars(c).values())]
        found += [f for f in held if isinstance(f, FunctionType) and f.__code__.co_filename == module.__file__]
    return found


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


_BETWEEN = b"\n"  # JSON without spaces has none
_WORDS = (
    "raw", "tans", "ranked", "constant", "bytes", "bf16", "fp16", "fp32", "int8", "packed-4", "planes-2", "trits", "U8",
    "BF16", "F32", "data_offsets", "shape", "fields", "layout", "4096", "4294967296", "null", "-1",
)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--last", type=Path, default=Path(tempfile.gettempdir()) / "fuzz-container-seed")
    parser.add_argument("--atheris", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.atheris:
        with_atheris(arguments.seconds, arguments.atheris)
    else:
        counts = run(arguments.seconds, arguments.seed, arguments.last)
        print(f"{sum(v for k, v in counts.items() if k != 'slow')} executions: {dict(sorted(counts.items()))}")
