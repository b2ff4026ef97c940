"""The two familiar calls: quantize a model in memory, load a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowbit.arrays import Tensor
from lowbit.calibration.synthetic import calibration_tokens
from lowbit.errors import CheckpointError, FormatError, ModelError, RecipeError
from lowbit.formats.activation import Input
from lowbit.formats.heads import CacheFormat
from lowbit.formats.qtensor import Nested, QTensor
from lowbit.io import native
from lowbit.methods.nested import at_bits
from lowbit.models.graph import split_experts
from lowbit.models.pretrained import from_directory
from lowbit.models.source import Source, of_model
from lowbit.pipeline.recipe import Calibration, parse
from lowbit.pipeline.result import Finished
from lowbit.pipeline.walk import prepared, walk
from lowbit.runtime import transformers_quantizer
from lowbit.runtime.decoding import restore
from lowbit.runtime.kernels import check_policy
from lowbit.runtime.linear import PackedWeight, QLinear
from lowbit.runtime.stream_model import stream


def quantize(
    model: PreTrainedModel, recipe: str, *, text: str | None = None, tokenizer: Any = None, tokens: Any = None
) -> PreTrainedModel:
    """Quantize a transformers model in memory by a recipe; its linears become QLinears, in place.

    ``text`` is a file, ``pydoc`` (the default), ``self`` or ``random``, and needs ``tokenizer`` (found by the model's
    own name when it came from a directory); ``tokens`` (windows, length) are used as they are. The same walk as
    ``lowbit quantize``, run in the model's dtype on its device. ``model.save_pretrained`` writes what
    ``from_pretrained`` reads again. Raises RecipeError, CalibrationError, ModelError and CoverageError, each before
    the model is touched.
    """
    parsed = parse(recipe)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError("is already quantized", where=type(model).__name__, fix="the original model")
    source = of_model(model)
    if prepared(source, parsed) is not source:
        raise RecipeError(
            "rotates the residual stream of the whole model", where=recipe, fix="lowbit quantize, or fused=false"
        )
    if parsed.calibrated and tokens is None:
        tokens = _tokens(source, model, parsed.calibration, text, tokenizer)
    sink = _Memory()
    walk(source, parsed, tokens, sink, dtype=model.dtype, device=model.device)
    split_experts(model)
    known = {name for name, _ in model.named_parameters()}
    for name, value in sink.edited.items():
        owner, _, leaf = name.rpartition(".")
        edited = nn.Parameter(value.to(model.device, model.dtype), requires_grad=False)
        model.get_submodule(owner).register_parameter(leaf, edited)
    for site, q in sink.codes.items():
        parent, _, leaf = site.rpartition(".")
        old = model.get_submodule(site)
        bias = None if old.bias is None else old.bias.detach()  # type: ignore[union-attr, operator]
        linear = QLinear.of(q, bias, model.dtype, sink.inputs.get(site))
        setattr(model.get_submodule(parent), leaf, linear.to(model.device))
    settings = native.Settings(
        {site: q.spec() for site, q in sink.codes.items()}, {site: i.format for site, i in sink.inputs.items()},
        tuple(sorted(sink.edited.keys() - known)), native.cache_format(parsed),
    )  # fmt: skip
    model.config.quantization_config = transformers_quantizer.LowbitConfig(recipe=parsed.line, **settings.to_json())
    return model


def load(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu", kernels: str = "auto",
    bits: int | None = None, memory: int | None = None, tokens: int = 1024,
) -> PreTrainedModel:  # fmt: skip
    """Load a native checkpoint as a transformers model, after checking every byte against its manifest.

    ``dtype`` is that of activations and of what is not quantized (default: bfloat16 where the processor multiplies it
    in hardware, else float32). ``kernels``: see :meth:`QLinear.use`. ``bits`` reads nested weights (MatQuant) at that
    width, whatever it was made for; FormatError where there are none. Raises CheckpointError, also for a directory
    without a manifest: what ``save_pretrained`` wrote is read by ``AutoModelForCausalLM.from_pretrained``.

    With ``memory``, this process will hold no more than so many bytes while it runs texts of ``tokens``: blocks that do
    not fit are read from disk at every pass (see :mod:`lowbit.runtime.stream_model`). RecipeError with the smallest
    memory that suffices.
    """
    check_policy(kernels)
    root = Path(path)
    if not native.is_native(root):
        raise CheckpointError(
            "is no lowbit checkpoint", where=str(root), why=f"it has no {native.MANIFEST} to check its bytes against",
            fix="the -o directory of lowbit quantize, or AutoModelForCausalLM.from_pretrained on what it saved itself",
        )  # fmt: skip
    if memory is not None:
        if bits is not None or kernels != "auto" or device != "cpu":
            raise RecipeError(
                "memory goes with the CPU, and with neither bits nor a choice of kernels", where=str(root),
                why="blocks that pass through a buffer are multiplied where they lie", fix="memory alone",
            )  # fmt: skip
        return stream(root, memory, tokens=tokens, dtype=dtype or compute_dtype()).model
    native.verify(root)
    try:
        model = from_directory(root, dtype or compute_dtype(device))
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise ModelError(f"transformers cannot load it: {error}", where=str(root)) from error
    if bits is not None:
        _read_at(model, bits, str(root))
    use_kernels(model, kernels)
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers wraps the method, and its types
    return model


def _read_at(model: PreTrainedModel, bits: int, where: str) -> None:
    linears = [m for m in model.modules() if isinstance(m, QLinear) and m.weight.spec.node == "Nested"]
    if not linears:
        raise FormatError("holds no nested weights", where=where, fix="lowbit quantize MODEL nested:int8-row -o OUT")
    for linear in linears:
        q = linear.weight.qtensor()
        assert isinstance(q, Nested)  # by its spec
        linear.weight = PackedWeight.of(at_bits(q, bits), linear.weight.dtype)


def cache_format(model: PreTrainedModel) -> CacheFormat | None:
    """How the recipe of a quantized model wants its keys and values rounded; None for models without a say."""
    config = getattr(model.config, "quantization_config", None)
    return config.settings().kv if isinstance(config, transformers_quantizer.LowbitConfig) else None


def use_kernels(model: nn.Module, policy: str) -> None:
    """Set the kernel policy of every QLinear of a model; other modules compute as their own classes do."""
    restore(model)
    for module in model.modules():
        if isinstance(module, QLinear):
            module.use(policy)


def compute_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 where matrix units or vector instructions multiply it, else float32."""
    if device != "cpu":
        return torch.bfloat16
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _tokens(source: Source, model: PreTrainedModel, c: Calibration, text: str | None, tokenizer: Any) -> Any:
    if tokenizer is None:
        from transformers import AutoTokenizer

        name = getattr(model.config, "_name_or_path", "")
        if not name or not Path(name).is_dir():
            raise ModelError("no tokenizer is known for a model in memory", fix="tokenizer=..., or tokens=...")
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    return calibration_tokens(
        source, text or c.text, samples=c.samples, length=c.length, seed=c.seed, tokenizer=tokenizer, dtype=model.dtype
    ).ids


class _Memory:
    """A sink that keeps everything in memory."""

    def __init__(self) -> None:
        self.codes: dict[str, QTensor] = {}
        self.inputs: dict[str, Input] = {}
        self.edited: dict[str, Tensor] = {}

    def has(self, block: str) -> bool:
        return False

    def read(self, block: str) -> Finished:
        raise KeyError(block)

    def write(self, block: str, module: nn.Module, done: Finished) -> None:
        self.codes.update(done.codes)
        self.inputs.update(done.inputs)
        self.edited.update(done.edited)
