"""Calibration without text: the model writes its own (``self``), or tokens are drawn blindly (``random``).

``self`` follows LLM-QAT (Liu et al. 2023, arXiv:2305.17888): every window starts from another token of the vocabulary,
goes on greedily to 3, 4 or 5 tokens, and is sampled from there, from the whole distribution. Added here: special and
placeholder tokens are never written, so no window ends early, and a guard keeps each from running in circles.
``random`` is the control: what calibration is worth when nothing is known of the inputs but the vocabulary.

    tokens = calibration_tokens(source, "self", samples=32, length=512, seed=0)
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from lowbit import digest
from lowbit.arrays import Float, Int, Tensor
from lowbit.calibration import text as texts
from lowbit.calibration.text import Tokens
from lowbit.errors import CalibrationError, ModelError
from lowbit.models.source import Source

GREEDY = (3, 5)  # tokens of a window before sampling begins, its first included; drawn for every window
NGRAM = 4
DISTINCT = 0.8  # least share of a window's 4-grams that are its first of their kind; prose has 0.97 to 0.99
CACHE_LIMIT = 1 << 30  # bytes of keys and values held at once
_BATCH = 64  # windows written at once, where their keys and values fit
_VERSION = 1  # of what is written for a seed; part of every identity here
_PLACEHOLDER = re.compile(r"[<\[]\|?(unused|reserved|extra_id|dummy|pad|placeholder).*[>\]]", re.IGNORECASE | re.DOTALL)

OnTokens = Callable[[int, int], object]


def calibration_tokens(
    source: Source, name: str, *, samples: int, length: int, seed: int | None, tokenizer: Any = None,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    on_tokens: OnTokens = lambda done, total: None,
) -> Tokens:  # fmt: skip
    """The calibration windows that a recipe names: of a file, of ``pydoc``, by the model ``self``, or ``random``.

    ``tokenizer`` is the source's unless given. ``dtype`` and ``device`` are those of the passes in which a model
    writes, which tells ``on_tokens`` (done, total). ``self`` holds the whole model and at most ``CACHE_LIMIT`` bytes
    of keys and values, and reads the weights once for each position of a batch of windows. What it wrote is kept in
    the cache folder: rounding differs between machines and numbers of threads, and a run that is taken up again must
    find the tokens that it began with. Raises CalibrationError and ModelError.
    """
    tokenizer = source.tokenizer if tokenizer is None else tokenizer
    if name not in texts.SYNTHETIC:
        return texts.sample(texts.read(name, "calibration"), tokenizer, samples, length, seed)
    if seed is None:
        raise CalibrationError("windows that are drawn need a seed", where=name, fix="seed = 0")
    _check_length(source, length)
    tokens = usable(tokenizer, source.config.get_text_config(decoder=True).vocab_size)
    if name == "random":
        ids = uniform(tokens, samples, length, seed)
    else:
        key = [source.digest, digest.of_tensor(tokens), samples, length, seed, str(dtype), _VERSION]
        memo = digest.cache_folder() / "synthetic" / digest.of_value(key)
        found = _recall(memo, samples, length)
        if found is None:
            model = runnable(source, dtype).to(torch.device(device))  # type: ignore[arg-type]  # a wrapped method
            found = self_written(model, tokens, samples, length, seed, on_tokens)
            _remember(memo, found)
        ids = found
    return Tokens(ids, name, identity(name, source.digest), seed)


def identity(name: str, model_digest: str) -> str:
    """What stands for a text's digest in keys and manifests, known before a token exists.

    The sha256 of the text, or for a synthetic name of that name, the model and the version of the generator.
    """
    if name in texts.SYNTHETIC:
        return digest.of_value([name, model_digest, _VERSION])
    return texts.read(name, "calibration").digest


def usable(tokenizer: Any, vocabulary: int) -> Int[Tensor, "usable"]:
    """Ids below ``vocabulary`` that stand for text, ascending: neither special nor placeholders nor unnamed rows."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = sorted(
        i for token, i in tokenizer.get_vocab().items()
        if i < vocabulary and i not in special and not _PLACEHOLDER.fullmatch(token)
    )  # fmt: skip
    if not ids:
        raise CalibrationError("the tokenizer names no token of text that the model knows", where="calibration")
    return torch.tensor(ids)


def uniform(tokens: Int[Tensor, "usable"], samples: int, length: int, seed: int) -> Int[Tensor, "samples length"]:
    """Every position drawn alike from ``tokens``."""
    generator = torch.Generator().manual_seed(seed)
    return tokens[torch.randint(len(tokens), (samples, length), generator=generator)]


def self_written(
    model: PreTrainedModel, tokens: Int[Tensor, "usable"], samples: int, length: int, seed: int,
    on_tokens: OnTokens = lambda done, total: None,
) -> Int[Tensor, "samples length"]:  # fmt: skip
    """Windows that a model writes with ``tokens`` alone, each from another first token while there are enough.

    All draws are made before the model runs, so a window depends on the seed and its place, not on the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(tokens), generator=generator)
    first = tokens[order[torch.arange(samples) % len(tokens)]]
    greedy = torch.randint(GREEDY[0], GREEDY[1] + 1, (samples,), generator=generator)
    draws = torch.rand(samples, length, generator=generator, dtype=torch.float64)
    batch, written = _batch(model, first[:1], length), []
    for start in range(0, samples, batch):
        part = slice(start, start + batch)
        rows = len(first[part])

        def told(position: int, start: int = start, rows: int = rows) -> None:
            on_tokens(start * length + rows * position, samples * length)

        written.append(continued(model, tokens, first[part], greedy[part], draws[part], told))
    return torch.cat(written)


@torch.inference_mode()
def continued(
    model: PreTrainedModel, tokens: Int[Tensor, "usable"], first: Int[Tensor, "rows"], greedy: Int[Tensor, "rows"],
    draws: Float[Tensor, "rows length"], on_position: Callable[[int], object] = lambda position: None,
) -> Int[Tensor, "rows length"]:  # fmt: skip
    """Windows from their first tokens: the likeliest up to ``greedy`` tokens, then the quantile ``draws`` in [0, 1).

    A position's quantile is that of the cumulated distribution over ``tokens`` in order of id, after the guard.
    Raises CalibrationError when a prediction is not finite.
    """
    rows, length = draws.shape
    ids = torch.empty(rows, length, dtype=torch.int64)
    ids[:, 0] = first
    guards = [_Guard() for _ in range(rows)]
    past: Any = None
    on_position(1)
    for t in range(1, length):
        out = model(input_ids=ids[:, t - 1 : t].to(model.device), past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits = out.logits[:, -1].double().cpu()[:, tokens]
        if not torch.isfinite(logits).all():
            raise CalibrationError(
                "the model's predictions are NaN or infinite", where=f"token {t} of its own text",
                fix="--dtype float32, or a text",
            )  # fmt: skip
        for row, guard in enumerate(guards):
            banned = guard.banned(ids[row, max(t - NGRAM + 1, 0) : t].tolist())
            if len(banned) == len(tokens):
                raise CalibrationError(
                    f"all {len(tokens)} tokens would repeat", where="its own text", fix="shorter windows, or a text"
                )
            if banned:
                logits[row, torch.isin(tokens, torch.tensor(sorted(banned)))] = -torch.inf
        mass = logits.softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(mass, draws[:, t, None] * mass[:, -1:] * (1 - 1e-12), right=True)[:, 0]
        ids[:, t] = tokens[torch.where(t < greedy, logits.argmax(-1), drawn)]
        for row, guard in enumerate(guards):
            guard.add(ids[row, max(t - NGRAM + 1, 0) : t + 1].tolist())
        on_position(t + 1)
    return ids


class _Guard:
    """The 4-grams of one window; from where too many would be repeats, none that is one may follow."""

    def __init__(self) -> None:
        self._followers: dict[tuple[int, ...], set[int]] = {}
        self._seen = self._repeats = 0

    def banned(self, last: list[int]) -> set[int]:
        """Tokens that may not follow the last three."""
        if self._repeats + 1 <= (1 - DISTINCT) * (self._seen + 1):
            return set()
        return self._followers.get(tuple(last), set())

    def add(self, gram: list[int]) -> None:
        """Take in the newest 4-gram; a window's first three tokens make none."""
        if len(gram) < NGRAM:
            return
        followers = self._followers.setdefault(tuple(gram[:-1]), set())
        self._seen += 1
        self._repeats += gram[-1] in followers
        followers.add(gram[-1])


def distinct(ids: Int[Tensor, "windows length"], n: int = NGRAM) -> float:
    """Distinct n-grams over all n-grams of a set of windows; 1 says that none occurs twice, 0 that there is none."""
    grams = ids.unfold(1, n, 1).reshape(-1, n)
    return len(torch.unique(grams, dim=0)) / max(len(grams), 1)


def runnable(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model of a source with its weights in ``dtype``; a tied weight is held once."""
    model: PreTrainedModel = copy.deepcopy(source.skeleton)
    filled: dict[int, nn.Parameter] = {}
    for name, held in list(model.named_parameters(remove_duplicate=False)):
        if id(held) not in filled:
            weight = source.tensor(name, tuple(held.shape)).to(dtype)
            filled[id(held)] = nn.Parameter(weight, requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._parameters[leaf] = filled[id(held)]
    for name, buffer in list(model.named_buffers()):
        if source.has(name):
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = source.tensor(name, tuple(buffer.shape)).to(buffer.dtype)
    return model.eval()  # type: ignore[no-any-return]


@torch.inference_mode()
def _batch(model: PreTrainedModel, token: Int[Tensor, "1"], length: int) -> int:
    """Windows whose keys and values fit the limit, by what the model keeps for one token."""
    kept = model(input_ids=token[:, None].to(model.device), use_cache=True).past_key_values
    layers = getattr(kept, "layers", None)
    if not layers:
        raise ModelError(
            "keeps no keys and values between tokens", where=type(model).__name__,
            why="its own text would cost a pass over all earlier tokens for each new one", fix="a text",
        )  # fmt: skip
    held = [value for layer in layers for value in vars(layer).values() if isinstance(value, Tensor)]
    nbytes = length * sum(value.numel() * value.element_size() for value in held)
    return max(1, min(_BATCH, CACHE_LIMIT // max(nbytes, 1)))


def _check_length(source: Source, length: int) -> None:
    longest = getattr(source.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise CalibrationError(
            f"windows of {length} tokens, the model reads at most {longest}", where=source.name,
            fix=f"a length of at most {longest}",
        )  # fmt: skip


def _recall(memo: Path, samples: int, length: int) -> Int[Tensor, "samples length"] | None:
    """What was remembered, unless it is not there whole."""
    with contextlib.suppress(OSError):
        data = memo.read_bytes()
        if len(data) == 32 + 4 * samples * length and hashlib.sha256(data[32:]).digest() == data[:32]:
            ids = np.frombuffer(data, dtype="<i4", offset=32).astype(np.int64)
            return torch.from_numpy(ids).view(samples, length)
    return None


def _remember(memo: Path, ids: Int[Tensor, "samples length"]) -> None:
    """Keep windows as their sha256 and 32-bit ids. A cache that cannot be written costs time, nothing else."""
    data = ids.numpy().astype("<i4").tobytes()
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        partial = memo.with_suffix(f".{os.getpid()}")
        partial.write_bytes(hashlib.sha256(data).digest() + data)
        partial.replace(memo)
