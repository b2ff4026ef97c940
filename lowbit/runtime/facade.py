"""The two familiar calls: quantize a model in memory, load a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowbit.calibration import text as texts
from lowbit.errors import CheckpointError, ModelError
from lowbit.formats.qtensor import QTensor
from lowbit.io import native
from lowbit.models.graph import split_experts
from lowbit.models.source import of_model
from lowbit.pipeline.recipe import parse
from lowbit.pipeline.walk import SiteReport, walk
from lowbit.runtime import transformers_quantizer
from lowbit.runtime.kernels import check_policy
from lowbit.runtime.linear import QLinear


def quantize(
    model: PreTrainedModel, recipe: str, *, text: str | None = None, tokenizer: Any = None, tokens: Any = None
) -> PreTrainedModel:
    """Quantize a transformers model in memory by a recipe; its linears become QLinears, in place.

    ``text`` is a file or the name ``pydoc`` (the default) and needs ``tokenizer`` (found by the model's own name when
    it came from a directory); ``tokens`` (windows, length) are used as they are. The same walk as ``lowbit quantize``,
    run in the model's dtype. ``model.save_pretrained`` writes what ``from_pretrained`` reads again. Raises RecipeError,
    CalibrationError, ModelError and CoverageError, each before the model is touched.
    """
    parsed = parse(recipe)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError("is already quantized", where=type(model).__name__, fix="the original model")
    source = of_model(model)
    if parsed.calibrated and tokens is None:
        tokens = _tokens(model, parsed.calibration, text, tokenizer)
    sink = _Memory()
    walk(source, parsed, tokens, sink, dtype=model.dtype)
    split_experts(model)
    for site, q in sink.codes.items():
        parent, _, leaf = site.rpartition(".")
        old = model.get_submodule(site)
        bias = None if old.bias is None else old.bias.detach()  # type: ignore[union-attr, operator]
        setattr(model.get_submodule(parent), leaf, QLinear.of(q, bias, model.dtype).to(model.device))
    specs: dict[Any, list[str]] = {}
    for site, q in sink.codes.items():
        specs.setdefault(q.spec(), []).append(site)
    formats = [{"spec": spec.to_json(), "sites": sites} for spec, sites in specs.items()]
    model.config.quantization_config = transformers_quantizer.LowbitConfig(native.VERSION, parsed.line, formats)
    return model


def load(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu", kernels: str = "auto"
) -> PreTrainedModel:
    """Load a native checkpoint as a transformers model, after checking every byte against its manifest.

    ``dtype`` is that of activations and of what is not quantized (default: bfloat16 where the processor multiplies it
    in hardware, else float32). ``kernels``: see :meth:`QLinear.use`. Raises CheckpointError, also for a directory
    without a manifest: what ``save_pretrained`` wrote is read by ``AutoModelForCausalLM.from_pretrained``.
    """
    check_policy(kernels)
    root = Path(path)
    if not native.is_native(root):
        raise CheckpointError(
            "is no lowbit checkpoint", where=str(root), why=f"it has no {native.MANIFEST} to check its bytes against",
            fix="the -o directory of lowbit quantize, or AutoModelForCausalLM.from_pretrained on what it saved itself",
        )  # fmt: skip
    native.verify(root)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            root, dtype=dtype or compute_dtype(device), local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise ModelError(f"transformers cannot load it: {error}", where=str(root)) from error
    use_kernels(model, kernels)
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers wraps the method, and its types
    return model


def use_kernels(model: nn.Module, policy: str) -> None:
    """Set the kernel policy of every QLinear of a model."""
    for module in model.modules():
        if isinstance(module, QLinear):
            module.use(policy)


def compute_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 where matrix units or vector instructions multiply it, else float32."""
    if device != "cpu":
        return torch.bfloat16
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _tokens(model: PreTrainedModel, calibration: Any, text: str | None, tokenizer: Any) -> Any:
    if tokenizer is None:
        from transformers import AutoTokenizer

        name = getattr(model.config, "_name_or_path", "")
        if not name or not Path(name).is_dir():
            raise ModelError("no tokenizer is known for a model in memory", fix="tokenizer=..., or tokens=...")
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    read = texts.read(text or calibration.text, "calibration")
    return texts.sample(read, tokenizer, calibration.samples, calibration.length, calibration.seed).ids


class _Memory:
    """A sink that keeps codes in memory."""

    def __init__(self) -> None:
        self.codes: dict[str, QTensor] = {}

    def has(self, block: str) -> bool:
        return False

    def read(self, block: str) -> Mapping[str, QTensor]:
        raise KeyError(block)

    def write(self, block: str, module: nn.Module, codes: Mapping[str, QTensor], reports: list[SiteReport]) -> None:
        self.codes.update(codes)
