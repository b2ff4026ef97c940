"""How transformers loads a native checkpoint: its registered quantizer swaps linears for QLinears before loading.

Imported by the hook in :mod:`lowbit` in the middle of transformers' own import, whoever causes it, so the rest of
lowbit is imported inside the calls.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.errors import CheckpointError

if TYPE_CHECKING:
    from lowbit.formats.spec import Spec


@register_quantization_config("lowbit")
class LowbitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a native checkpoint: version, recipe and the spec of every site."""

    def __init__(self, version: int = 0, recipe: str = "", formats: Any = (), **_: Any) -> None:
        self.quant_method = "lowbit"  # type: ignore[assignment]  # transformers types its own methods only
        self.version, self.recipe, self.formats = version, recipe, list(formats)

    def specs(self) -> dict[str, Spec]:
        from lowbit.io.native import site_specs

        return site_specs({"version": self.version, "formats": self.formats}, "config.json")

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": "lowbit", "version": self.version, "recipe": self.recipe, "formats": self.formats,
        }  # fmt: skip


@register_quantizer("lowbit")
class LowbitHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps modules on the meta device; transformers then loads every part by its name.

    Shards that lowbit wrote say so in their metadata and are checked byte for byte against the manifest beside them.
    ``save_pretrained`` writes files without either: of those, only presence, shapes and dtypes can be checked.
    """

    requires_calibration = True
    quantization_config: LowbitConfig

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Any = None, dtype: torch.dtype | None = None, **_: Any
    ) -> None:
        from lowbit.io.layout import opened
        from lowbit.io.native import verify

        for root in {file.parent for file in map(Path, checkpoint_files or ()) if _is_ours(opened(file))}:
            verify(root)
        install(model, self.quantization_config.specs(), dtype or torch.get_default_dtype())

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for name, part in model.named_buffers():
            packed = model.get_submodule(name.rpartition(".")[0])
            # transformers fills what a file lacks with arbitrary numbers, and marks what it has loaded
            if hasattr(packed, "qtensor") and not getattr(part, "_is_hf_initialized", False):
                where = str(getattr(model, "name_or_path", ""))
                raise CheckpointError(f"the part {name!r} is missing", where=where, fix="save the model again")

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _is_ours(shard: contextlib.AbstractContextManager[Any]) -> bool:
    with shard as file:
        return "lowbit" in (file.metadata() or {})


def install(model: nn.Module, specs: dict[str, Spec], dtype: torch.dtype) -> None:
    """Put an empty QLinear (meta device) at every site; raises CheckpointError where the model has no such linear."""
    from lowbit.models.graph import is_linear, matrix, split_experts
    from lowbit.runtime.linear import QLinear

    split_experts(model)
    for site, spec in specs.items():
        parent, _, leaf = site.rpartition(".")
        try:
            old = model.get_submodule(site)
        except AttributeError:
            old = None
        if old is None or not is_linear(old):
            raise CheckpointError("the model has no such linear", where=f"config.json: {site}")
        if tuple(matrix(old).shape) != spec.shape:
            raise CheckpointError(
                f"the spec says {spec.shape}, the model has {tuple(matrix(old).shape)}", where=f"config.json: {site}"
            )
        setattr(model.get_submodule(parent), leaf, QLinear(spec, old.bias is not None, dtype))
