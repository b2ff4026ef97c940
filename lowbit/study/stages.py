"""The stages of a study: what each kind of cell computes. Outputs are small JSON; big results are files.

    quantize    model, recipe, text              -> a native checkpoint
    reference   model, text, protocol            -> hidden states and token evidence
    floor       reference                        -> the reference against itself with another batch size
    score       checkpoint or directory          -> token evidence beside the reference
    attribute   checkpoint                       -> KL of each low-bit block alone
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowbit import digest
from lowbit.calibration import text as texts
from lowbit.errors import ModelError
from lowbit.evaluation import evidence
from lowbit.evaluation.attribution import kl_by_block
from lowbit.evaluation.protocol import Windows, parse
from lowbit.evaluation.scorer import Scorer
from lowbit.formats.qtensor import QTensor
from lowbit.io import native
from lowbit.models.resolve import open_model
from lowbit.models.source import of_directory
from lowbit.pipeline.recipe import Recipe
from lowbit.pipeline.walk import walk
from lowbit.runtime import facade
from lowbit.study.engine import Stage
from lowbit.study.worker import StageContext

_MAKES = ("lowbit.formats", "lowbit.methods", "lowbit.models", "lowbit.calibration", "lowbit.pipeline", "lowbit.io")
_SCORES = (*_MAKES, "lowbit.evaluation", "lowbit.runtime")

QUANTIZE = Stage("quantize", "lowbit.study.stages:quantize", _MAKES)
REFERENCE = Stage("reference", "lowbit.study.stages:reference", _SCORES)
FLOOR = Stage("floor", "lowbit.study.stages:floor", _SCORES)
SCORE = Stage("score", "lowbit.study.stages:score", _SCORES)
ATTRIBUTE = Stage("attribute", "lowbit.study.stages:attribute", _SCORES)

BLOCKS = "blocks.json"


def quantize(context: StageContext) -> Mapping[str, Any]:
    """Make the checkpoint; a killed cell goes on at the block where it was."""
    source = open_model(context.params["model"])
    recipe = Recipe.model_validate(context.params["recipe"])
    done = make(source, recipe, context.checkpoint, torch_dtype(context.params["dtype"]), context.report)
    return {**done, "recipe": recipe.line}


def make(
    source: Any, recipe: Recipe, out: Path, dtype: torch.dtype, report: Callable[[int, int, str], object]
) -> dict[str, Any]:
    """Quantize a source into a native checkpoint and describe the result."""
    if native.is_native(out):
        return describe(out)
    started, cpu = time.perf_counter(), time.process_time()
    tokens = None
    if recipe.calibrated:
        c = recipe.calibration
        tokens = texts.sample(texts.read(c.text, "calibration"), source.tokenizer, c.samples, c.length, c.seed)
    writer = native.Writer(out, source, recipe, tokens.digest if tokens else None)
    try:
        ids = None if tokens is None else tokens.ids
        walk(source, recipe, ids, writer, dtype=dtype, on_progress=lambda p: report(p.done, p.total, "linears"))
        extra = {
            "calibration_text": None if tokens is None else {"name": tokens.text, "digest": tokens.text_digest},
            "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu,
        }  # fmt: skip
        writer.finish(extra)
    finally:
        writer.close()
    return describe(out)


def describe(out: Path) -> dict[str, Any]:
    """Size, bits and identity of a native checkpoint, from its manifest."""
    manifest = native.verify(out, contents=False)
    sites, files = manifest["sites"], manifest["files"]
    nbytes = sum(site["nbytes"] for site in sites)
    weights = sum(8 * site["nbytes"] / site["bits_per_weight"] for site in sites)
    return {
        "digest": digest.of_value({name: entry["sha256"] for name, entry in files.items()}),
        "bytes_total": sum(entry["bytes"] for entry in files.values()),
        "bits_per_weight": 8 * nbytes / weights, "sites": len(sites), "source": manifest["source"],
        "seconds": manifest["seconds"], "cpu_seconds": manifest["cpu_seconds"],
    }  # fmt: skip


def reference(context: StageContext) -> Mapping[str, Any]:
    source = open_model(context.params["model"])
    windows = _windows(context.params, source.tokenizer)
    scorer = Scorer(_dense(source.root, context.params), source.digest, batch=context.params["batch"])
    found = scorer.reference(windows, _counter(context, windows))
    evidence.write_reference(context.folder, found)
    return {
        "windows": len(windows.ids), "length": int(windows.ids.shape[1]), "tokens": windows.scored,
        "text": windows.text, "text_digest": windows.text_digest, "protocol": windows.protocol,
        "identity": scorer.identity, "dtype": found.provenance.dtype, "model_digest": source.digest,
        "bytes_total": source.store.nbytes(),
    }  # fmt: skip


def floor(context: StageContext) -> Mapping[str, Any]:
    """The noise floor: the same weights, scored with another batch size."""
    source = open_model(context.params["model"])
    windows = _windows(context.params, source.tokenizer)
    scorer = Scorer(_dense(source.root, context.params), source.digest, batch=context.params["batch"] + 1)
    return _score(context, scorer, windows, context.input_folder(0))


def score(context: StageContext) -> Mapping[str, Any]:
    """A candidate: the checkpoint of the second input, or the directory that the parameters name."""
    source = open_model(context.params["model"])
    windows = _windows(context.params, source.tokenizer)
    path = Path(context.params["candidate"]) if "candidate" in context.params else context.input_checkpoint(1)
    if native.is_native(path):
        model = facade.load(path, dtype=torch_dtype(context.params["dtype"]), kernels="dense")
        weights = describe(path)["digest"]
    else:
        candidate = of_directory(path)
        model, weights = _dense(candidate.root, context.params), candidate.digest
    scorer = Scorer(model, weights, batch=context.params["batch"])
    return _score(context, scorer, windows, context.input_folder(0))


def attribute(context: StageContext) -> Mapping[str, Any]:
    """KL of each block alone, on a few short windows."""
    source = open_model(context.params["model"])
    path = Path(context.params["candidate"]) if "candidate" in context.params else context.input_checkpoint(0)
    held: dict[str, dict[str, QTensor]] = {block: {} for block in source.blocks}
    for site, q in native.qtensors(path):
        held[next(b for b in source.blocks if site.startswith(b + "."))][site] = q
    windows, length = context.params["attribution_windows"], context.params["attribution_length"]
    text = texts.read(context.params["text"], "evaluation")
    tokens = texts.sample(text, source.tokenizer, windows, length, None).ids
    found = kl_by_block(
        source, held.__getitem__, tokens, torch_dtype(context.params["dtype"]),
        lambda done, total: context.report(done, total, "blocks"),
    )  # fmt: skip
    rows = [{"block": b, "value": v.estimate, "low": v.low, "high": v.high} for b, v in found]
    (context.folder / BLOCKS).write_text(json.dumps(rows))
    return {"blocks": len(rows), "tokens": windows * length}


def torch_dtype(name: str) -> torch.dtype:
    """``auto`` is the dtype that this processor multiplies fastest without losing range."""
    return facade.compute_dtype() if name == "auto" else getattr(torch, name)  # type: ignore[no-any-return]


def _score(context: StageContext, scorer: Scorer, windows: Windows, reference_folder: Path) -> dict[str, Any]:
    tokens, provenance = scorer.score(
        windows, evidence.read_reference(reference_folder), _counter(context, windows)
    )  # fmt: skip
    evidence.write_tokens(context.folder, tokens, provenance)
    return {"identity": scorer.identity, "kl": float(tokens.kl.mean())}


def _dense(root: Path | None, params: Mapping[str, Any]) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(  # type: ignore[no-any-return]
            root, dtype=torch_dtype(params["dtype"]), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"transformers cannot load it: {error}", where=str(root)) from error


def _windows(params: Mapping[str, Any], tokenizer: Any) -> Windows:
    text = texts.read(params["text"], "evaluation")
    ids = texts.encode(text, tokenizer)
    return parse(params["protocol"]).cut(ids, params["windows"], text.name, text.digest)


def _counter(context: StageContext, windows: Windows) -> Callable[[int], None]:
    done = 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        context.report(done, windows.scored, "tokens")

    return count
