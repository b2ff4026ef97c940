"""Are saved files what was meant to be saved? Every installed reader opens them, and is compared bit by bit.

What counts is what others read from the disk, not what was in memory when it was written: each reader loads the files
anew, its matrices are compared with those of the native model, and its logits on a short text, where it computes any.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lowbit.arrays import Float, Int, Tensor
from lowbit.errors import CheckpointError, LowbitError, ModelError
from lowbit.io.export import PROVENANCE
from lowbit.io.hubnames import HubNames
from lowbit.io.interchange import registry
from lowbit.io.interchange.rows import take_rows
from lowbit.io.opening import LowBit, open_low_bit
from lowbit.io.pickles import refuse_pickles
from lowbit.models.store import read_json

Status = Literal["opened", "not installed", "not asked", "failed"]
TOKENS = 256
ROUNDING = 1e-6
"""Packages that multiply float32 scales in another order than lowbit end within this of its weights."""


class Found(NamedTuple):
    """What a reader made of the files."""

    equal: int = 0
    tensors: int = 0
    """How many matrices it showed, and how many of them are bit for bit those of the native model."""
    logits: Float[Tensor, "tokens vocab"] | None = None
    note: str = ""
    off: float = 0.0
    """Largest difference of a weight, as a share of the largest weight of its matrix."""


@dataclass(frozen=True)
class Verdict:
    """One reader's line."""

    reader: str
    status: Status
    detail: str = ""
    """What to install, or why it failed or was not asked."""
    equal: int = 0
    tensors: int = 0
    kl: float | None = None
    """Mean KL(native || reader) over the tokens, nats; None for readers that compute nothing."""
    agree: float | None = None
    """Share of tokens on which both predict the same."""
    off: float = 0.0
    """Largest difference of a weight, as a share of the largest weight of its matrix."""

    @property
    def wrong(self) -> bool:
        """Whether the reader failed, computes NaN, or reads weights off by more than the rounding of its arithmetic."""
        return self.status == "failed" or self.off > ROUNDING or (self.kl is not None and math.isnan(self.kl))


@dataclass(frozen=True)
class Subject:
    """What is checked, and what it should be."""

    path: Path
    layout: str
    reference: LowBit | None
    tokens: Int[Tensor, "tokens"]

    def matrices(self) -> Iterator[tuple[str, Float[Tensor, "out in"]]]:
        """By the name that files use: what every linear with codes should be, float32. Nothing without a reference."""
        if self.reference is None:
            return
        names = HubNames(self.reference.source)
        for group in self.reference.groups():
            for site, q in group.codes.items():
                for part in names.parts(site):
                    yield part.site, take_rows(q, part.rows).decode()


@dataclass(frozen=True)
class Reader:
    """Somebody's way to read the files of some layouts; ``read`` raises whatever that somebody raises."""

    name: str
    needs: tuple[str, ...]
    """Modules that must be installed."""
    layouts: frozenset[str]
    read: Callable[[Subject], Found]
    ours: bool = False
    """Whether it believes nothing unchecked; where it refuses files, no other reader is given them."""


def layout_of(path: Path) -> str:
    """Which layout files are in: ``lowbit``, ``gguf``, a low-bit layout, or ``dense``. Raises CheckpointError."""
    refuse_pickles(path)
    if path.is_file() and path.suffix == ".gguf":
        return "gguf"
    if not path.is_dir():
        raise ModelError("is no directory and no .gguf file", where=str(path), fix="what lowbit export wrote")
    config = read_json(path / "config.json").get("quantization_config")
    if not config:
        return "dense"
    if not isinstance(config, dict):
        raise CheckpointError("quantization_config is no table", where=str(path / "config.json"))
    if config.get("quant_method") == "lowbit":
        return "lowbit"
    return registry.of_config(config, str(path / "config.json")).name


def reference_of(path: Path) -> Path | None:
    """The checkpoint that files were exported from, when they say so and it is still there."""
    source = _source(path)
    if not isinstance(source.get("path"), str) or source.get("origin") == "rounded":
        return None
    found: Path = ((path if path.is_dir() else path.parent) / source["path"]).resolve()
    return found if found.exists() else None


def _source(path: Path) -> dict[str, Any]:
    """What files say that they were exported from."""
    said = path / PROVENANCE if path.is_dir() else path.with_name(f"{path.name}.{PROVENANCE}")
    source = read_json(said).get("source") if said.is_file() else None
    return source if isinstance(source, dict) else {}


def check(
    path: Path, against: Path | None = None, *, readers: Iterable[Reader] | None = None, tokens: int = TOKENS
) -> list[Verdict]:
    """Let every reader of the layout open the files, one after the other; a reader that fails is a line, no error.

    ``against`` is a low-bit model of any layout, by default what the files say they were exported from. Without it,
    readers only open the files. Files that our own reader refuses are given to no other. Logits are compared on the
    first ``tokens`` of a text, in float32. Memory: the model twice. Raises ModelError and CheckpointError for what
    no reader could open.
    """
    from lowbit.io.readers import READERS
    from lowbit.models.gguf import plain
    from lowbit.models.gguf_header import check_header

    layout, found = layout_of(path), against or reference_of(path)
    reference = None if found is None else open_low_bit(found)
    if against is None and reference is not None and reference.digest != _source(path).get("digest"):
        raise CheckpointError(
            "is not what it was when it was exported", where=str(found),
            why=f"{path} names another digest", fix="--against what it should be, or export again",
        )  # fmt: skip
    ids = torch.arange(64) if reference is None else sample_tokens(reference, tokens)
    subject = Subject(path, layout, reference, ids)
    if layout == "gguf":
        check_header(plain(path))
    expected: Tensor | None = None
    verdicts: list[Verdict] = []
    refused = False
    for reader in READERS if readers is None else readers:
        if layout not in reader.layouts:
            continue
        if missing := [name for name in reader.needs if find_spec(name) is None]:
            verdicts.append(
                Verdict(
                    reader.name,
                    "not installed",
                    f"pip install {' '.join(missing).replace('llama_cpp', 'llama-cpp-python')}",
                )
            )
            continue
        if refused:
            verdicts.append(Verdict(reader.name, "not asked", "lowbit refuses the files"))
            continue
        try:
            with contextlib.redirect_stdout(sys.stderr):  # packages tell of themselves there, and it may be JSON's
                read = reader.read(subject)
        except Exception as error:  # somebody else's code on files that may be wrong: whatever it raises is the finding
            verdicts.append(Verdict(reader.name, "failed", _short(error), tensors=0))
            refused |= reader.ours
            continue
        kl = agree = None
        if read.logits is not None and reference is not None:
            expected = native_logits(reference, subject.tokens) if expected is None else expected
            kl, agree = divergence(expected, read.logits)
        verdicts.append(Verdict(reader.name, "opened", read.note, read.equal, read.tensors, kl, agree, read.off))
    return verdicts


def native_logits(model: LowBit, tokens: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens vocab"]:
    """The logits of a low-bit model as lowbit computes them, from its native files, in float32."""
    from lowbit.runtime.facade import load

    if model.origin != "lowbit":
        raise CheckpointError("logits are those of a native checkpoint", where=str(model.path), fix="lowbit import")
    loaded = load(model.path, dtype=torch.float32, kernels="reference")
    with torch.inference_mode():
        logits: Tensor = loaded(tokens[None]).logits[0]
    return logits.float()


def divergence(
    expected: Float[Tensor, "tokens vocab"], found: Float[Tensor, "tokens vocab"]
) -> tuple[float, float]:  # fmt: skip
    """Mean KL(expected || found) in nats, and the share of tokens with the same prediction."""
    kl = token_kl(expected, found[:, : expected.shape[1]])
    return float(kl.mean()), float((expected.argmax(-1) == found[:, : expected.shape[1]].argmax(-1)).double().mean())


def token_kl(
    expected: Float[Tensor, "tokens vocab"], found: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, "tokens"]:  # fmt: skip
    """KL(expected || found) at every token, nats, computed in float64."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def sample_tokens(low_bit: LowBit, count: int) -> Int[Tensor, "tokens"]:
    """A short text in the model's own tokens; random ones where it has no tokenizer."""
    from lowbit.calibration import text as texts

    model = low_bit.source
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or count
    count = min(count, longest)
    try:
        text = texts.read(texts.DEFAULT, "evaluation")
        beginning = texts.Text(text.name, text.content[: 16 * count])  # no tokenizer has 16 characters a token
        return texts.encode(beginning, model.tokenizer)[:count]
    except ModelError:  # no tokenizer: any tokens tell readers apart
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(0))


def _short(error: Exception) -> str:
    what = error.what if isinstance(error, LowbitError) else str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {what}"[:300]
