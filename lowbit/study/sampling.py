"""Cells of what models write: every setting of a sampler, with the same random numbers for all (evaluation/sampler.py).

write    a model, prompts, settings, seeds  ->  texts by setting, their likelihood under the original, costs;
         a candidate's: also how far its distributions are from the original's, on the original's own texts

Texts are written with weights decoded once, as everything is scored. Costs are those of a single text by the kernels
that ``lowbit generate`` would choose, candidate and original in turn, so that a busy machine slows both.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel

from lowbit import digest
from lowbit.calibration import text as texts
from lowbit.errors import StudyError
from lowbit.evaluation import sampler
from lowbit.evaluation import sampler_evidence as evidence
from lowbit.evaluation.sampler import Gap, Grid, MakeCache, Setting
from lowbit.evaluation.sampler_evidence import Costs, Provenance, Round
from lowbit.evaluation.scorer import Scorer
from lowbit.models.source import of_directory
from lowbit.runtime import facade
from lowbit.runtime.kvcache import KVCache
from lowbit.runtime.linear import QLinear
from lowbit.study import stages
from lowbit.study.engine import Cell
from lowbit.study.rows import Member
from lowbit.study.spec import Sampling
from lowbit.study.worker import Stage, StageContext

WRITE = Stage("write", "lowbit.study.sampling:write", stages.REFERENCE.code)
ROUNDS = 8  # texts that are timed
TIMED_TOKENS = 8  # decoded in each


@dataclass(frozen=True)
class SampleGrid:
    """The cells of one model: what the original writes, and every candidate by label."""

    model: str
    settings: Sampling
    reference: Cell
    versions: Mapping[str, Cell]

    @property
    def cells(self) -> list[Cell]:
        return [self.reference, *self.versions.values()]

    @property
    def members(self) -> list[Member]:
        return [Member(cell.key, f"{self.model}/write") for cell in self.cells]


def of_made(
    model: str, common: Mapping[str, Any], made: Mapping[str, Cell], settings: Sampling, prefix: str = ""
) -> SampleGrid:
    """The cells of candidates that a study makes; ``made`` maps labels to the cells whose checkpoints they are.

    ``common`` are the parameters that scored cells share (model, text, dtype and their digests). Runs nothing.
    """
    shared = {key: common[key] for key in ("model", "model_digest", "dtype", "text", "text_digest")}
    params = {**shared, **settings.model_dump(exclude={"lengths"})}  # shorter texts are read off the longest
    reference = Cell(WRITE, f"{prefix}texts of {model}", (), params, common["model_digest"])
    versions = {
        label: Cell(WRITE, f"{prefix}texts of {label}", (reference.key, cell.key), params, cell.key)
        for label, cell in made.items()
    }
    return SampleGrid(model, settings, reference, versions)


def write(context: StageContext) -> Mapping[str, Any]:
    """One model's texts in every setting, gaps and costs; the inputs of a candidate are the original's and its own."""
    params = context.params
    prompts, text = _prompts(params)
    top_k = [k or None for k in params["top_k"]]
    grid = Grid.of(params["temperatures"], top_k, range(params["seeds"]), params["max_new_tokens"])
    gc.collect()
    before = psutil.Process().memory_info().rss
    weights, model, make_cache = _candidate(context)
    alone = sampler.timed(model, prompts[0], TIMED_TOKENS, make_cache)  # warms up, and is all that is loaded
    reference = stages.dense_model(Path(params["model"]), params["dtype"]) if context.inputs else model
    costs = Costs(
        params["dtype"], torch.get_num_threads(), _kernels(model), sampler.static_bytes(model),
        alone.peak_bytes - before, _rounds(model, reference, prompts, make_cache),
    )  # fmt: skip
    evidence.write_costs(context.folder, costs)
    facade.use_kernels(model, "dense")
    written = sampler.write(
        model, reference, prompts, grid,
        make_cache=make_cache, on_prompt=lambda done: context.report(done, len(prompts), "prompts"),
    )  # fmt: skip
    rows = len(grid.settings) * len(grid.seeds)
    kv = facade.cache_format(model)
    identity = Scorer(model, weights, batch=rows, kv=kv, chunk=1).identity
    original = identity
    asked = digest.of_value(prompts)
    if context.inputs:
        base, provenance = evidence.read_texts(context.input_folder(0))
        original = provenance.model
        evidence.write_gaps(context.folder, _gaps(reference, model, prompts, base, grid.settings))
    own = Provenance(identity, original, asked, text.name, text.digest, params["dtype"])
    evidence.write_texts(context.folder, written, own)
    tokens = sum(int(t.length.sum()) for t in written.values())
    return {"texts": len(prompts) * rows, "tokens": tokens, "identity": identity, "static_bytes": costs.static_bytes}


def _prompts(params: Mapping[str, Any]) -> tuple[list[list[int]], texts.Text]:
    """Pieces of the text that the cell was planned with, drawn all over it."""
    source, text = of_directory(Path(params["model"])), texts.read(params["text"], "evaluation")
    for name, found, planned in (
        (params["model"], source.digest, params["model_digest"]), (params["text"], text.digest, params["text_digest"])
    ):  # fmt: skip
        if found != planned:
            raise StudyError("changed after this cell was planned", where=name, fix="run the study again")
    longest = getattr(source.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and params["prompt"] + params["max_new_tokens"] > longest:
        raise StudyError(
            f"{params['prompt']} tokens of prompt and {params['max_new_tokens']} new ones, the model reads at most "
            f"{longest}", where="sampling", fix="a smaller max_new_tokens",
        )  # fmt: skip
    return texts.sample(text, source.tokenizer, params["prompts"], params["prompt"], 0).ids.tolist(), text


def _candidate(context: StageContext) -> tuple[str, PreTrainedModel, MakeCache | None]:
    """The digest of the model that writes, the model as ``lowbit generate`` loads it, and its cache."""
    dtype = context.params["dtype"]
    if not context.inputs:
        return context.params["model_digest"], stages.dense_model(Path(context.params["model"]), dtype), None
    path = context.input_checkpoint(1)
    model = facade.load(path, dtype=stages.torch_dtype(dtype))
    kv = facade.cache_format(model)
    make = None if kv is None else partial(_rounded, kv)
    return stages.describe(path)["digest"], model, make


def _rounded(kv: Any, model: PreTrainedModel) -> KVCache:
    return KVCache(model.config, kv)


def _kernels(model: PreTrainedModel) -> dict[str, int]:
    """Linears by the kernel that multiplies a single token."""
    linears = [m for m in model.modules() if isinstance(m, QLinear)]
    with torch.inference_mode():
        used = [m.kernel(torch.zeros(1, m.in_features, dtype=model.dtype, device=model.device)) for m in linears]
    return dict(Counter(kernel.name for kernel in used))


def _rounds(
    model: PreTrainedModel, reference: PreTrainedModel, prompts: Sequence[Sequence[int]], make_cache: MakeCache | None
) -> tuple[Round, ...]:
    """Both take turns, and turns at being first; the original beside itself is timed once."""
    rounds = []
    sampler.timed(reference, prompts[0], 1)
    for i, prompt in enumerate(prompts[:ROUNDS]):
        if reference is model:
            cost = sampler.timed(model, prompt, TIMED_TOKENS)
            rounds.append(Round(cost, cost))
            continue
        first = sampler.timed(reference, prompt, TIMED_TOKENS) if i % 2 else None
        cost = sampler.timed(model, prompt, TIMED_TOKENS, make_cache)
        rounds.append(Round(cost, first or sampler.timed(reference, prompt, TIMED_TOKENS)))
    return tuple(rounds)


def _gaps(
    reference: PreTrainedModel, model: PreTrainedModel, prompts: Sequence[Sequence[int]],
    written: evidence.Texted, settings: Sequence[Setting],
) -> dict[Setting, Gap]:  # fmt: skip
    """Means by prompt over what the original wrote with its first seed, in the setting nearest its own distribution."""
    plain = min(written, key=lambda s: (abs(s.temperature - 1), s.top_k is not None))
    own, found = written[plain], []
    for i, prompt in enumerate(prompts):
        row = int(np.flatnonzero(own.prompt == i)[0])
        tokens = own.token[row, : own.length[row]].tolist()
        one = sampler.gaps(reference, model, [*prompt, *tokens[:-1]], settings, start=len(prompt) - 1)
        found.append({setting: [gap.kl.mean(), gap.total_variation.mean()] for setting, gap in one.items()})
    return {s: Gap(*np.array([by[s] for by in found]).T) for s in settings}
