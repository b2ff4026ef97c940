"""Layouts by the names that users type, imported when asked for; and which one a ``quantization_config`` means."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from lowbit.errors import CheckpointError, ExportError, nearest
from lowbit.io.interchange.base import Layout, LayoutClass

_CLASSES = {
    "gptq": "gptq:Gptq",
    "gptq-v2": "gptq:GptqV2",
    "awq": "awq:Awq",
    "compressed-tensors": "compressed_tensors:CompressedTensors",
    "bnb": "bitsandbytes:BitsAndBytes",
    "bf16": "dense:BF16",
    "fp16": "dense:FP16",
    "fp32": "dense:FP32",
}
LOW_BIT = ("gptq", "gptq-v2", "awq", "compressed-tensors", "bnb")
"""Layouts that hold codes, in the order in which they are proposed."""
DENSE = ("bf16", "fp16", "fp32")
_METHODS = {
    "gptq": "gptq", "awq": "awq", "compressed-tensors": "compressed-tensors", "bitsandbytes": "bnb",
}  # fmt: skip


def layout(name: str) -> LayoutClass:
    """The layout of a name; raises ExportError with the nearest name."""
    if name not in _CLASSES:
        raise ExportError(f"unknown format {name!r}", fix=nearest(name, [*_CLASSES, "gguf", "gguf:q4_0"]))
    module, _, cls = _CLASSES[name].partition(":")
    found: LayoutClass = getattr(importlib.import_module(f"lowbit.io.interchange.{module}"), cls)
    return found


def of_config(config: Mapping[str, Any], where: str) -> Layout:
    """The layout that an untrusted ``quantization_config`` means, with its settings; raises CheckpointError."""
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        raise CheckpointError(
            f"quantization_config.quant_method is {method!r}", where=where, why="lowbit does not read that layout",
            fix=nearest(str(method), _METHODS),
        )  # fmt: skip
    name = _METHODS[method]
    if name == "gptq" and (config.get("checkpoint_format") or config.get("format")) == "gptq_v2":
        name = "gptq-v2"
    return layout(name).of_config(config)
