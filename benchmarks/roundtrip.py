"""Every layout: does its export open in every installed reader, with the same bits and the same predictions?

    python benchmarks/roundtrip.py --work DIR [--site SITE_PACKAGES] [--only awq=rtn:int4-g64] MODEL ...
    python benchmarks/roundtrip.py --work DIR --gguf FILE

For each MODEL (a directory, or ``smollm2``) and layout: quantize with a recipe that the layout holds, export, let
every reader of ``lowbit check`` read the saved files, import them again and compare every stored part; prints
docs/results/roundtrip.md. Checkpoints are kept in ``--work`` and made once. ``--site`` is a folder of readers that are
no dependencies of the package (llama-cpp-python), searched last. Codes are rounded to nearest, since which codes they
are makes no difference here. GPTQModel, whose kernels transformers takes for ``gptq`` and ``awq``, wants a newer torch
than ``[all]`` brings: run the page in an environment that has it.

With ``--gguf`` the file becomes a native checkpoint and a GGUF file again; prints one JSON object: tensors, those of
the same type, shape and bytes, and metadata keys that are lost, new, or changed. Ends with 1 unless all tensors are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from gguf import GGUFReader, ReaderTensor

from lowbit.errors import LowbitError
from lowbit.io.check import TOKENS, check
from lowbit.io.convert import convert
from lowbit.io.importing import import_low_bit
from lowbit.io.interchange.registry import DENSE
from lowbit.io.opening import LowBit, open_low_bit
from lowbit.models.resolve import open_model
from lowbit.pipeline.recipe import parse
from lowbit.study.stages import make

CASES = [
    ("gptq", "rtn:int4-g64-sym"),
    ("gptq", "rtn:int3-row-sym"),
    ("gptq-v2", "rtn:int4-g64"),
    ("awq", "rtn:int4-g64"),
    ("compressed-tensors", "rtn:int4-g64-sym"),
    ("compressed-tensors", "rtn:int4-g64"),
    ("compressed-tensors", "rtn:int8-row-sym+a:int8-token-sym"),
    ("compressed-tensors", "rtn:fp8-e4m3"),
    ("compressed-tensors", "rtn:nvfp4"),
    ("compressed-tensors", "rtn:mxfp4"),
    ("bnb", "rtn:nf4"),
    ("bnb", "rtn:nf4-dq"),
    ("bnb", "rtn:int8-row-sym"),
    ("gguf", "rtn:q4_0"),
    ("gguf", "rtn:q8_0"),
    ("bf16", "rtn:int4-g64"),
]
HEAD = """# Every layout, saved and read back

Each row is one reader on the files of one export. *Equal*: matrices (for lowbit's own importer all tensors) that the
reader shows, and how many of them are the native checkpoint's, bit for bit, in float32 or, where the reader computes
in 16 bit, rounded to that. *kl*: of the reader's logits from those of the native checkpoint in float32, mean over
{tokens} tokens of English, in nats; *top*: the share of them with the same most likely token. *Imported*: stored parts
(codes, scales, zeros) of the files, imported again, that equal those of the checkpoint.
"""
FOOT = """
Readers: {versions}. Rows that say `not installed` were not run.

    {command}
"""


class Row(NamedTuple):
    layout: str
    recipe: str
    size: str
    reader: str
    opened: str
    equal: str
    kl: str
    top: str
    imported: str


def rows(model: str, work: Path, only: list[str]) -> Iterator[Row]:
    source = open_model(model)
    for layout, line in CASES:
        if only and f"{layout}={line}" not in only:
            continue
        native = work / source.name / line.replace(":", "-").replace("+", "-")
        make(source, parse(line), native, torch.float32, lambda *_: None)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            out = Path(folder) / ("model.gguf" if layout == "gguf" else "model")
            started = time.perf_counter()
            try:
                done = convert(open_low_bit(native), layout, out)
            except LowbitError as error:
                yield Row(layout, line, "refused", "", error.what, "", "", "", "")
                continue
            print(f"{source.name} {layout} {line}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
            try:
                imported = "" if layout in DENSE else parts_equal(open_low_bit(native), open_low_bit(out))
            except LowbitError as error:
                imported = f"refused ({error.what})"
            for verdict in check(out, native):
                if verdict.reader == "vLLM":
                    continue
                said = f" ({verdict.detail})" if verdict.detail and verdict.status != "not installed" else ""
                yield Row(
                    layout, line, f"{done.nbytes / 1e6:.2f} MB", verdict.reader,
                    {"opened": "yes"}.get(verdict.status, verdict.status) + said,
                    f"{verdict.equal} of {verdict.tensors}" if verdict.tensors else "–",
                    "–" if verdict.kl is None else f"{verdict.kl:.2g}",
                    "–" if verdict.agree is None else f"{100 * verdict.agree:.1f} %", imported,
                )  # fmt: skip
                imported = ""


def parts_equal(one: LowBit, other: LowBit) -> str:
    """How many stored parts of all linears are the same, path, dtype and bytes."""
    equal = count = 0
    for a, b in zip(one.groups(), other.groups(), strict=True):
        for site, q in a.codes.items():
            found = {part.path: part.data for part in b.codes[site].parts()} if site in b.codes else {}
            for part in q.parts():
                same = found.get(part.path)
                equal += same is not None and same.dtype == part.data.dtype and torch.equal(same, part.data)
                count += 1
    return f"{equal} of {count}"


class Back(NamedTuple):
    """A GGUF file against what it became through a native checkpoint."""

    tensors: int
    same: int
    different: list[str]
    keys: int
    lost: list[str]
    new: list[str]
    changed: list[str]


def gguf_and_back(file: Path, work: Path) -> Back:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        native, again = Path(folder) / file.stem, Path(folder) / "again.gguf"
        import_low_bit(open_low_bit(file), native)
        convert(open_low_bit(native), "gguf", again)
        one, other = GGUFReader(file), GGUFReader(again)
        tensors, others = ({t.name: t for t in reader.tensors} for reader in (one, other))
        different = sorted(
            name for name in tensors.keys() | others.keys()
            if name not in tensors or name not in others or identity(tensors[name]) != identity(others[name])
        )  # fmt: skip
        keys, again_keys = (
            {k: f.contents() for k, f in r.fields.items() if not k.startswith("GGUF.")} for r in (one, other)
        )
        return Back(
            len(tensors), len(tensors) - sum(name in tensors for name in different), different, len(keys),
            sorted(keys.keys() - again_keys.keys()), sorted(again_keys.keys() - keys.keys()),
            sorted(k for k in keys.keys() & again_keys.keys() if keys[k] != again_keys[k]),
        )  # fmt: skip


def identity(tensor: ReaderTensor) -> tuple[object, ...]:
    return tensor.tensor_type, tuple(tensor.shape), tensor.data.tobytes()


def versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("transformers", "compressed-tensors", "bitsandbytes", "gguf", "llama-cpp-python", "optimum",
                 "gptqmodel", "torch"):  # fmt: skip
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="this file, there and back")
    parser.add_argument("--site", help="folder of more readers")
    parser.add_argument("--only", action="append", default=[], metavar="LAYOUT=RECIPE")
    given = parser.parse_args()
    if given.site:
        sys.path.append(given.site)
    os.environ.setdefault("TQDM_DISABLE", "1")
    given.work.mkdir(parents=True, exist_ok=True)
    if given.gguf:
        back = gguf_and_back(given.gguf, given.work)
        print(json.dumps({"file": given.gguf.name, **back._asdict()}, indent=1))
        sys.exit(bool(back.different))
    shown = [*(["--site SITE_PACKAGES"] if given.site else []), *(f"--only {case}" for case in given.only)]
    print(HEAD.format(tokens=TOKENS))
    for model in given.models:
        print(f"## {Path(model).name}\n\n| {' | '.join(Row._fields)} |\n|{' --- |' * len(Row._fields)}", flush=True)
        for row in rows(model, given.work, given.only):
            print(f"| {' | '.join(row)} |", flush=True)
        print()
    names = " ".join(Path(model).name for model in given.models)
    command = " ".join(["python benchmarks/roundtrip.py --work DIR", *shown, names])
    print(FOOT.format(versions=versions(), command=command).strip())


if __name__ == "__main__":
    main()
