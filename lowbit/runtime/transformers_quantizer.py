"""How transformers loads a native checkpoint: its registered quantizer swaps linears for QLinears before loading.

Imported by the hook in :mod:`lowbit` in the middle of transformers' own import, whoever causes it, so the rest of
lowbit is imported inside the calls.
"""

from __future__ import annotations

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
        self.quant_method = "lowbit"
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
    """Swaps modules on the meta device; transformers then loads every part by its name."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Any = None, dtype: torch.dtype | None = None, **_: Any
    ) -> None:
        from lowbit.io.native import verify

        for root in {Path(file).parent for file in checkpoint_files or ()}:
            verify(root)
        install(model, self.quantization_config.specs(), dtype or torch.get_default_dtype())

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


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
