"""The stages of a study: what each kind of cell computes. Outputs are small JSON; big results are files.

card        model, text                      -> statistics that several recipes are calibrated from
quantize    model, recipe, text or card      -> a native checkpoint
reference   model, text, protocol            -> hidden states and token evidence
floor       reference                        -> the reference against itself with another batch size
score       checkpoint or directory          -> token evidence beside the reference
attribute   checkpoint                       -> KL of each low-bit block alone
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lowbit import digest
from lowbit.arrays import Int, Tensor
from lowbit.calibration import cards
from lowbit.calibration import text as texts
from lowbit.calibration.synthetic import calibration_tokens
from lowbit.calibration.text import Tokens
from lowbit.errors import ModelError, RecipeError, StudyError, nearest
from lowbit.evaluation import by_blocks, evidence
from lowbit.evaluation.attribution import kl_by_block
from lowbit.evaluation.protocol import Windows, parse
from lowbit.evaluation.scorer import Scorer, WindowScorer
from lowbit.formats.qtensor import QTensor
from lowbit.io import native
from lowbit.models.pretrained import from_directory
from lowbit.models.resolve import open_model
from lowbit.models.source import Source, of_directory
from lowbit.pipeline.recipe import Calibration, Recipe
from lowbit.pipeline.walk import Progress, prepared, walk
from lowbit.runtime import facade
from lowbit.study.worker import Stage, StageContext

_MAKES = ("lowbit.formats", "lowbit.methods", "lowbit.models", "lowbit.calibration", "lowbit.pipeline", "lowbit.io")
_OBSERVES = ("lowbit.models", "lowbit.calibration")
_SCORES = (*_MAKES, "lowbit.evaluation", "lowbit.runtime")

CARD = Stage("card", "lowbit.study.stages:card", _OBSERVES)
QUANTIZE = Stage("quantize", "lowbit.study.stages:quantize", _MAKES)
REFERENCE = Stage("reference", "lowbit.study.stages:reference", _SCORES)
FLOOR = Stage("floor", "lowbit.study.stages:floor", _SCORES)
SCORE = Stage("score", "lowbit.study.stages:score", _SCORES)
ATTRIBUTE = Stage("attribute", "lowbit.study.stages:attribute", _SCORES)

BLOCKS, STATISTICS = "blocks.json", "statistics.safetensors"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def card(context: StageContext) -> Mapping[str, Any]:
    """One pass over the calibration text, for all recipes that propagate the original."""
    source, c = _source(context.params), Calibration.model_validate(context.params["calibration"])
    dtype = torch_dtype(context.params["dtype"])
    tokens = calibration_tokens(source, c.text, samples=c.samples, length=c.length, seed=c.seed, dtype=dtype)
    kinds = [cards.KINDS[name] for name in context.params["kinds"]]
    path = context.folder / STATISTICS
    made = cards.make(
        path, source, tokens, kinds=kinds, dtype=dtype, batch=c.batch,
        on_block=lambda done, total: context.report(done, total, "blocks"),
    )  # fmt: skip
    return {"digest": made.digest, "bytes": path.stat().st_size, "tokens": int(tokens.ids.numel())}


def quantize(context: StageContext) -> Mapping[str, Any]:
    """Make the checkpoint, from the card that is its input if any; a killed cell goes on at the block where it was."""
    source = _source(context.params)
    recipe = Recipe.model_validate(context.params["recipe"])
    known = context.input_folder(0) / STATISTICS if context.inputs else None
    dtype = torch_dtype(context.params["dtype"])
    return make(source, recipe, context.checkpoint, dtype, context.report, card=known)


def make(
    source: Source, recipe: Recipe, out: Path, dtype: torch.dtype, report: Callable[[int, int, str], object],
    *, card: Path | None = None, device: str = "cpu", say: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Quantize a source into a native checkpoint and describe the result; nothing is done twice.

    Statistics come from the recipe's calibration text, or from a ``card`` of this model. ``say`` is told what a user
    should know meanwhile (memory that ran out). Raises StorageError when ``out`` holds anything else, and
    what :func:`walk` raises.
    """
    started, cpu = time.perf_counter(), time.process_time()
    tokens, known = None, None if card is None else cards.read(card)
    if recipe.calibrated and known is None:
        c = recipe.calibration
        tokens = calibration_tokens(
            source, c.text, samples=c.samples, length=c.length, seed=c.seed, dtype=dtype, device=device,
            on_tokens=lambda done, total: report(done, total, "tokens"),
        )  # fmt: skip
    source = prepared(source, recipe)
    calibration = known.digest if known else tokens.digest if tokens else None
    with native.Writer(out, source, recipe, calibration, dtype) as writer:
        if writer.already_done:
            return {**describe(out), "already_done": True}
        resumed = any(writer.has(block) for block in source.blocks)
        ids = None if tokens is None else tokens.ids

        def told(progress: Progress) -> None:
            if progress.note:
                say(progress.note)
            report(progress.done, progress.total, "linears")

        walk(source, recipe, ids, writer, card=known, dtype=dtype, device=device, on_progress=told)
        extra = {
            "calibration_text": _origin(tokens, known),
            "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu, "resumed": resumed,
        }  # fmt: skip
        writer.finish(extra)
    return {**describe(out), "already_done": False}


def _origin(tokens: Tokens | None, card: cards.Card | None) -> dict[str, str] | None:
    """The text that statistics came from, for the manifest."""
    if card is not None:
        return {"name": card.about.text, "digest": card.about.text_digest, "card": card.digest}
    return None if tokens is None else {"name": tokens.text, "digest": tokens.text_digest}


def describe(path: Path) -> dict[str, Any]:
    """Identity, size and bits of a native checkpoint, from its manifest, or of a dense directory.

    ``resumed``: whether the seconds are those of the last of several runs only.
    """
    if not native.is_native(path):
        return describe_dense(of_directory(path))
    manifest = native.verify(path, contents=False)
    sites, files = manifest["sites"], manifest["files"]
    nbytes = sum(site["nbytes"] for site in sites)
    weights = sum(8 * site["nbytes"] / site["bits_per_weight"] for site in sites)
    return {
        "digest": digest.of_value({name: entry["sha256"] for name, entry in files.items()}),
        "recipe": Recipe.model_validate(manifest["recipe"]).line, "source": manifest["source"],
        "bytes_total": sum((path / name).stat().st_size for name in files),  # of coded shards, as stored
        "bits_per_weight": 8 * nbytes / weights if sites else 16.0, "sites": len(sites),
        "notes": dict(Counter(site["note"] for site in sites if site.get("note"))),
        "seconds": manifest["seconds"], "cpu_seconds": manifest["cpu_seconds"], "resumed": manifest["resumed"],
    }  # fmt: skip


def describe_dense(source: Source) -> dict[str, Any]:
    """The same of a model that is not low-bit. 16 bit is the baseline: float32 files count half of what they take."""
    parameters = sum(p.numel() for p in source.skeleton.parameters())
    nbytes = min(source.store.nbytes(), 2 * parameters)
    return {
        "digest": source.digest, "recipe": "dense", "bytes_total": nbytes, "bits_per_weight": 8 * nbytes / parameters,
        "bytes_stored": source.store.nbytes(), "parameters": parameters, "seconds": 0.0,
    }  # fmt: skip


def reference(context: StageContext) -> Mapping[str, Any]:
    """Score the original once: its token evidence, and the hidden states that exact KL needs."""
    source, windows = _source(context.params), _windows(context.params)
    scorer = _scorer(context, Path(context.params["model"]), source.digest)
    found = scorer.reference(windows, _counter(context, windows))
    evidence.write_reference(context.folder, found)
    return {
        "windows": len(windows.ids), "length": int(windows.ids.shape[1]), "tokens": windows.scored,
        "text": windows.text, "text_digest": windows.text_digest, "protocol": found.provenance.protocol,
        "identity": scorer.identity, "dtype": found.provenance.dtype, **describe_dense(source),
    }  # fmt: skip


def floor(context: StageContext) -> Mapping[str, Any]:
    """The noise floor: the same weights, scored with another batch size."""
    return _score(context, _scorer(context, Path(context.params["model"]), context.params["model_digest"], more=1))


def score(context: StageContext) -> Mapping[str, Any]:
    """A candidate: the checkpoint of the second input, or the directory that the parameters name."""
    path = Path(context.params["candidate"]) if "candidate" in context.params else context.input_checkpoint(1)
    described = describe(path)
    if context.params.get("candidate_digest", described["digest"]) != described["digest"]:
        raise StudyError("changed after this cell was planned", where=str(path), fix="run it again")
    return {**described, **_score(context, _scorer(context, path, described["digest"]))}


def attribute(context: StageContext) -> Mapping[str, Any]:
    """KL of each block alone, on a few short windows."""
    source = _source(context.params)
    manifest = native.verify(context.input_checkpoint(0), contents=False)
    recipe = Recipe.model_validate(manifest["recipe"])
    if any(step.method == "imported" for step in recipe.step) or recipe.transforms:
        raise StudyError(
            "blocks of a transformed or imported model need not fit between those of the original", where="attribute",
            fix="attribute recipes without transforms",
        )  # fmt: skip
    held: dict[str, dict[str, QTensor]] = {block: {} for block in source.blocks}
    for site, q in native.qtensors(context.input_checkpoint(0)):
        held[next(b for b in source.blocks if site.startswith(b + "."))][site] = q
    windows, length = context.params["attribution_windows"], context.params["attribution_length"]
    tokens = texts.sample(_text(context.params), source.tokenizer, windows, length, None).ids
    found = kl_by_block(
        source, held.__getitem__, tokens, torch_dtype(context.params["dtype"]),
        lambda done, total: context.report(done, total, "blocks"),
    )  # fmt: skip
    rows = [{"block": b, "value": v.estimate, "low": v.low, "high": v.high} for b, v in found]
    (context.folder / BLOCKS).write_text(json.dumps(rows))
    return {"blocks": len(rows), "tokens": windows * length}


def torch_dtype(name: str) -> torch.dtype:
    """``auto`` is the dtype that this processor multiplies fastest without losing range. Raises RecipeError."""
    if name not in DTYPES:
        raise RecipeError(f"unknown dtype {name!r}", fix=nearest(name, DTYPES))
    return facade.compute_dtype() if name == "auto" else getattr(torch, name)  # type: ignore[no-any-return]


def dense_model(root: Path, dtype: str) -> PreTrainedModel:
    """A model as transformers loads it; raises ModelError when it cannot."""
    try:
        return from_directory(root, torch_dtype(dtype))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"transformers cannot load it: {error}", where=str(root)) from error


def _scorer(context: StageContext, path: Path, weights: str, more: int = 0) -> WindowScorer:
    """Of a model in memory, or of one read block by block where the cell has a ``memory``; ``more`` windows at once."""
    params, dtype, low_bit = context.params, torch_dtype(context.params["dtype"]), native.is_native(path)
    batch, memory = params["batch"] + more, params.get("memory")
    if memory is None:
        model = facade.load(path, dtype=dtype, kernels="dense") if low_bit else dense_model(path, params["dtype"])
        return Scorer(model, weights, batch=batch, kv=facade.cache_format(model), chunk=_chunk(params))
    return by_blocks.BlockScorer(
        by_blocks.low_bit(path, dtype) if low_bit else by_blocks.dense(path), weights, memory=memory, dtype=dtype,
        batch=batch, kv=native.settings(path).kv if low_bit else None,
        on_block=lambda done, total: context.report(done, total, "blocks"),
    )  # fmt: skip


def _score(context: StageContext, scorer: WindowScorer) -> dict[str, Any]:
    windows = _windows(context.params)
    reference = evidence.read_reference(context.input_folder(0))
    tokens, provenance = scorer.score(windows, reference, _counter(context, windows))
    evidence.write_tokens(context.folder, tokens, provenance)
    return {"identity": scorer.identity, "kl": float(tokens.kl.mean())}


def _chunk(params: Mapping[str, Any]) -> int | None:
    """How many tokens at a time the protocol runs through the cache; None for a whole window at once."""
    return parse(params["protocol"]).chunk


def _source(params: Mapping[str, Any]) -> Source:
    return _opened(params["model"], params["model_digest"])


@lru_cache(maxsize=1)
def _opened(model: str, model_digest: str) -> Source:
    """The model that the cell was planned with; the cells of a worker mostly share it."""
    source = open_model(model)
    if source.digest != model_digest:
        raise StudyError("changed after this cell was planned", where=model, fix="run the study again")
    return source


def _text(params: Mapping[str, Any]) -> texts.Text:
    """The text that the cell was planned with."""
    text = texts.read(params["text"], "evaluation")
    if text.digest != params["text_digest"]:
        raise StudyError("changed after this cell was planned", where=params["text"], fix="run the study again")
    return text


@lru_cache(maxsize=1)
def _encoded(model: str, model_digest: str, text: texts.Text) -> Int[Tensor, "tokens"]:
    return texts.encode(text, _opened(model, model_digest).tokenizer)


def _windows(params: Mapping[str, Any]) -> Windows:
    protocol = parse(params["protocol"])
    longest = getattr(_source(params).config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and protocol.length > longest:
        raise RecipeError(
            f"windows of {protocol.length} tokens, the model reads at most {longest}", where=str(protocol),
            why="predictions beyond what it was trained for say nothing about its low-bit versions",
            fix=f"--protocol windows-{longest}",
        )  # fmt: skip
    text = _text(params)
    ids = _encoded(params["model"], params["model_digest"], text)
    return protocol.cut(ids, params["windows"], text.name, text.digest)


def _counter(context: StageContext, windows: Windows) -> Callable[[int], None]:
    done = 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        context.report(done, windows.scored, "tokens")

    return count
