"""Sampler study: what models write over temperature, top-k and length, with the same random numbers for all of them.

Token j of a text is the inverse of the distribution's CDF at a uniform number that depends on (prompt, seed, j) alone:
two models that agree on a distribution draw the same token from it, so a text differs only where the models do, and
only until it first does. All cells, seeds and rows of a prompt share one prefill and one batch, and a shorter
``max_new_tokens`` is the start of a longer one (``Texts.first``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from jaxtyping import Float64
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from lowbit.arrays import Float, Int, Tensor
from lowbit.errors import EvidenceError
from lowbit.evaluation.metrics.generations import END, Texts
from lowbit.runtime.cascade import end_tokens

MakeCache = Callable[[PreTrainedModel], Cache]


class Setting(NamedTuple):
    """How tokens are drawn."""

    temperature: float
    """0 takes the most likely token."""
    top_k: int | None = None
    """Only the k most likely tokens; None for all."""


@dataclass(frozen=True)
class Grid:
    """What is written: every setting, with every seed, from every prompt."""

    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    max_new_tokens: int

    @classmethod
    def of(
        cls, temperatures: Sequence[float], top_k: Sequence[int | None], seeds: Sequence[int], max_new_tokens: int
    ) -> Grid:
        """Every temperature with every top-k; 0 stands once, for there top-k changes nothing.

        Raises EvidenceError for values that mean nothing.
        """
        bad = [t for t in temperatures if t < 0] + [k for k in top_k if k is not None and k < 1]
        if bad or not temperatures or not top_k or not seeds or max_new_tokens < 1:
            raise EvidenceError(
                f"no sampler grid: {bad or 'nothing to write'}", where="sampler",
                fix="temperatures from 0, top-k from 1, at least one seed and one token",
            )  # fmt: skip
        settings = [Setting(t, k if t else None) for t, k in product(temperatures, top_k)]
        return cls(tuple(dict.fromkeys(settings)), tuple(seeds), max_new_tokens)


def uniforms(prompt: int, seed: int, steps: int) -> Float64[np.ndarray, " steps"]:
    """The numbers in [0, 1) that draw the tokens of one text, for every model and setting alike."""
    return np.random.Generator(np.random.Philox(key=[prompt, seed])).random(steps)


def warped(logits: Float[Tensor, "rows vocab"], setting: Setting) -> Float[Tensor, "rows vocab"]:
    """The distribution that is drawn from, in float64; one-hot at temperature 0."""
    logits = logits.double()
    if setting.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    scaled = logits / setting.temperature
    if setting.top_k is not None and setting.top_k < logits.shape[-1]:
        best = scaled.topk(setting.top_k, dim=-1)
        scaled = torch.full_like(scaled, -torch.inf).scatter_(-1, best.indices, best.values)
    return torch.softmax(scaled, dim=-1)


def draw(p: Float[Tensor, "rows vocab"], u: Float[Tensor, "rows"]) -> Int[Tensor, "rows"]:
    """The first token whose cumulative probability exceeds u, in the order of the vocabulary."""
    cumulative = p.cumsum(-1)
    last = (p > 0).long().cumsum(-1).argmax(-1)  # rounding may leave the sum below u: never a token of probability 0
    drawn = torch.searchsorted(cumulative, u[:, None].contiguous(), right=True)[:, 0]
    return torch.minimum(drawn, last)


@torch.inference_mode()
def write(
    model: PreTrainedModel, reference: PreTrainedModel, prompts: Sequence[Sequence[int]], grid: Grid,
    *, make_cache: MakeCache | None = None, on_prompt: Callable[[int], None] = lambda _: None,
) -> dict[Setting, Texts]:  # fmt: skip
    """Write the grid from every prompt; ``reference`` (the 16-bit model, or ``model`` itself) reads the texts after.

    Texts come by setting, in the order prompt, seed. ``make_cache`` gives a low-bit KV cache. Cost: one prefill a
    prompt, a decode step for all rows at once, and one pass of the reference over what was written. Raises
    EvidenceError for an empty prompt.
    """
    if not prompts or not all(prompts):
        raise EvidenceError("an empty prompt", where="sampler", fix="at least one token in every prompt")
    parts: dict[Setting, list[dict[str, np.ndarray]]] = {s: [] for s in grid.settings}
    for i, prompt in enumerate(prompts):
        one = _one(model, list(prompt), i, grid, make_cache)
        nll_ref = one.nll if reference is model else _read(reference, list(prompt), one.token)
        seeds = len(grid.seeds)
        for k, setting in enumerate(grid.settings):
            rows = slice(k * seeds, (k + 1) * seeds)
            parts[setting].append({
                "prompt": np.full(seeds, i, np.int32), "seed": np.asarray(grid.seeds, np.int32),
                "token": one.token[rows].numpy().astype(np.int32), "stopped": one.stopped[rows].numpy(),
                "nll": one.nll[rows].numpy().astype(np.float32), "nll_ref": nll_ref[rows].numpy().astype(np.float32),
            })  # fmt: skip
        on_prompt(i + 1)
    return {
        setting: Texts(**{name: np.concatenate([c[name] for c in columns]) for name in columns[0]})
        for setting, columns in parts.items()
    }


@dataclass(frozen=True)
class Cost:
    """What one text took. Prefill and decode apart: one is bound by arithmetic, the other by bytes."""

    prompt_tokens: int
    prefill_seconds: float
    """Of the prompt and the first token."""
    decode_tokens: int
    """One at a time, after the first."""
    decode_seconds: float
    cache_bytes: int
    """Keys and values at the end."""
    peak_bytes: int
    """Of the accelerator's allocator, or else the largest resident size of this process that was seen."""

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """Tokens a second."""
        return self.decode_tokens / self.decode_seconds


@torch.inference_mode()
def timed(model: PreTrainedModel, prompt: Sequence[int], tokens: int, make_cache: MakeCache | None = None) -> Cost:
    """Time one greedy text of the first token and ``tokens`` more, past any end; nothing else is computed.

    Models compare only where they take turns in one process (``hypotheses.extremal``): a busy machine slows both.
    Raises EvidenceError for no prompt or no tokens.
    """
    if not prompt or tokens < 1:
        raise EvidenceError("nothing to time", where="sampler", fix="a prompt, and at least one token after the first")
    call: Any = model
    cache = _cache(model, make_cache)
    ids = torch.tensor([list(prompt)], device=model.device)
    peak = _Peak(model.device)

    def step(ids: Int[Tensor, "1 new"]) -> Int[Tensor, "1 1"]:
        logits = call(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        chosen: Tensor = logits[:, -1].argmax(-1, keepdim=True)
        chosen.item()  # an accelerator is done only now
        peak.look()
        return chosen

    started = time.perf_counter()
    ids = step(ids)
    prefilled = time.perf_counter()
    for _ in range(tokens):
        ids = step(ids)
    ended = time.perf_counter()
    return Cost(len(prompt), prefilled - started, tokens, ended - prefilled, _cache_bytes(cache), peak.nbytes)


class Gap(NamedTuple):
    """How far the candidate's next-token distribution is from the reference's, a number a position (or their mean)."""

    kl: Float64[np.ndarray, " n"]
    """KL(reference || candidate) in nats, over the tokens that the reference's setting allows, both made to sum to 1
    there: without that, a top-k makes it infinite. 0 at temperature 0."""
    total_variation: Float64[np.ndarray, " n"]
    """The chance that the best coupling of the two draws different tokens; of each model's own allowed tokens."""


@torch.inference_mode()
def gaps(
    reference: PreTrainedModel, candidate: PreTrainedModel, text: Sequence[int], settings: Sequence[Setting],
    start: int = 0,
) -> dict[Setting, Gap]:  # fmt: skip
    """The gap after every token of one text from ``start`` on, in every setting: one pass of each model."""
    ids = torch.tensor([list(text)])
    ours, theirs = (m(input_ids=ids.to(m.device)).logits[0, start:].double().cpu() for m in (reference, candidate))
    found = {}
    for setting in settings:
        p, q = warped(ours, setting), warped(theirs, setting)
        tv = 0.5 * (p - q).abs().sum(-1)
        if setting.temperature == 0:
            kl = torch.zeros_like(tv)
        else:
            log_p, log_q = (
                torch.log_softmax((logits / setting.temperature).masked_fill(p == 0, -torch.inf), dim=-1)
                for logits in (ours, theirs)
            )
            kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).clamp_min(0)
        found[setting] = Gap(kl.numpy(), tv.numpy())
    return found


def static_bytes(model: PreTrainedModel) -> int:
    """Bytes of all weights and buffers as they lie in memory, packed ones packed; shared ones once."""
    held = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in held}.values())


class _One(NamedTuple):
    token: Int[Tensor, "rows steps"]
    nll: Float[Tensor, "rows steps"]
    stopped: Tensor


def _one(model: PreTrainedModel, prompt: list[int], number: int, grid: Grid, make_cache: MakeCache | None) -> _One:
    """All settings and seeds of one prompt, setting by setting."""
    call: Any = model
    device, steps, seeds = model.device, grid.max_new_tokens, len(grid.seeds)
    rows = len(grid.settings) * seeds
    u = torch.from_numpy(np.stack([uniforms(number, seed, steps) for seed in grid.seeds]))
    cache = _cache(model, make_cache)
    ends = torch.tensor(sorted(end_tokens(model)), device=device)
    token = torch.full((rows, steps), END, dtype=torch.long)
    nll, done = torch.zeros(rows, steps, dtype=torch.float64), torch.zeros(rows, dtype=torch.bool, device=device)
    logits = call(input_ids=torch.tensor([prompt], device=device), past_key_values=cache, use_cache=True).logits[:, -1]
    cache.batch_repeat_interleave(rows)
    logits = logits.expand(rows, -1)
    for step in range(steps):
        chosen = torch.cat([
            draw(warped(logits[k * seeds : (k + 1) * seeds], setting), u[:, step].to(device))
            for k, setting in enumerate(grid.settings)
        ])  # fmt: skip
        live = ~done
        token[live.cpu(), step] = chosen[live].cpu()
        nll[live.cpu(), step] = _surprise(logits, chosen)[live].cpu()
        done = done | torch.isin(chosen, ends)
        if bool(done.all()) or step + 1 == steps:
            break
        logits = call(input_ids=chosen[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
    return _One(token, nll, done.cpu())


def _read(model: PreTrainedModel, prompt: list[int], token: Int[Tensor, "rows steps"]) -> Float[Tensor, "rows steps"]:
    """-log p of every token written, by another model; 0 behind the ends. The prompt is run once for all rows."""
    call: Any = model
    cache = _cache(model, None)
    given = token.clamp_min(0).to(model.device)
    logits = call(input_ids=torch.tensor([prompt], device=model.device), past_key_values=cache, use_cache=True).logits
    found = torch.zeros(token.shape, dtype=torch.float64)
    found[:, 0] = _surprise(logits[:, -1].expand(len(token), -1), given[:, 0]).cpu()
    if token.shape[1] > 1:
        cache.batch_repeat_interleave(len(token))
        logits = call(input_ids=given[:, :-1], past_key_values=cache, use_cache=True).logits
        for row, (one, t) in enumerate(zip(logits, given, strict=True)):
            found[row, 1:] = _surprise(one, t[1:]).cpu()
    return torch.where(token != END, found, 0.0)


def _surprise(logits: Float[Tensor, "n vocab"], token: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """-log p of a token a row, in float64."""
    logits = logits.double()
    return torch.logsumexp(logits, -1) - logits.gather(-1, token[:, None])[:, 0]


def _cache(model: PreTrainedModel, make: MakeCache | None) -> Cache:
    return DynamicCache(config=model.config) if make is None else make(model)


def _cache_bytes(cache: Cache) -> int:
    if isinstance(nbytes := getattr(cache, "nbytes", None), int):
        return nbytes
    held = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))


class _Peak:
    """The most memory that was in use whenever somebody looked."""

    def __init__(self, device: torch.device) -> None:
        self.nbytes, self._cuda, self._process = 0, device.type == "cuda", psutil.Process()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(device)

    def look(self) -> None:
        now = torch.cuda.max_memory_allocated() if self._cuda else self._process.memory_info().rss
        self.nbytes = max(self.nbytes, now)
