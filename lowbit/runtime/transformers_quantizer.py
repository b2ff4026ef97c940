"""How transformers loads a native checkpoint: its registered quantizer swaps linears for QLinears before loading.

And how it loads what ``lowbit compress`` wrote, low-bit or not: it opens files by the container's ``open_tensors``.

Imported by the hook in :mod:`lowbit` in the middle of transformers' own import, whoever causes it, so the rest of
lowbit is imported inside the calls.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers.modeling_utils
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.errors import CheckpointError

if TYPE_CHECKING:
    from lowbit.io.layout import Settings


@register_quantization_config("lowbit")
class LowbitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a native checkpoint: version, recipe, and where which format is."""

    def __init__(
        self, version: int = 0, recipe: str = "", formats: Any = (), activations: Any = (), added: Any = (),
        kv: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        self.quant_method = "lowbit"  # type: ignore[assignment]  # transformers types its own methods only
        self.version, self.recipe, self.formats = version, recipe, list(formats)
        self.activations, self.added, self.kv = list(activations), list(added), kv

    def settings(self) -> Settings:
        """The fields, checked; raises CheckpointError."""
        from lowbit.io.layout import Settings

        return Settings.from_json(self.to_dict(), "config.json")

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": "lowbit", "version": self.version, "recipe": self.recipe, "formats": self.formats,
            "activations": self.activations, "added": self.added, "kv": self.kv,
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
        install(model, self.quantization_config.settings(), dtype or torch.get_default_dtype())

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        from lowbit.runtime.linear import Stored

        ours = {id(part) for module in model.modules() if isinstance(module, Stored) for part in module.buffers()}
        parts = {name: part for name, part in model.named_buffers() if id(part) in ours}
        parts |= {name: model.get_parameter(name) for name in self.quantization_config.added}
        for name, part in parts.items():
            # transformers fills what a file lacks with arbitrary numbers, and marks what it has loaded
            if not getattr(part, "_is_hf_initialized", False):
                where = str(getattr(model, "name_or_path", ""))
                raise CheckpointError(f"the part {name!r} is missing", where=where, fix="save the model again")

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on top can be trained: codes themselves never are."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _open(path: str | Path, *arguments: Any, **options: Any) -> Any:
    from lowbit.codec.container import open_tensors

    return open_tensors(Path(path), *arguments, **options)


setattr(transformers.modeling_utils, "safe_open", _open)  # noqa: B010 - it has no other door for such files


def _is_ours(shard: contextlib.AbstractContextManager[Any]) -> bool:
    with shard as file:
        return "lowbit" in (file.metadata() or {})


def install(model: nn.Module, settings: Settings, dtype: torch.dtype) -> None:
    """Put an empty QLinear (meta device) at every site, and biases where they were added.

    Raises CheckpointError where the model has no such linear.
    """
    from lowbit.models.graph import matrix, split_experts
    from lowbit.runtime.linear import QLinear

    split_experts(model)
    for name in settings.added:
        linear = _linear(model, name.removesuffix(".bias"))
        if not name.endswith(".bias") or linear.bias is not None:
            raise CheckpointError("is no bias that the model lacks", where=f"config.json: added {name}")
        linear.bias = nn.Parameter(torch.empty(matrix(linear).shape[0], dtype=dtype, device="meta"), False)
    for site, spec in settings.specs.items():
        parent, _, leaf = site.rpartition(".")
        old = _linear(model, site)
        if tuple(matrix(old).shape) != spec.shape:
            raise CheckpointError(
                f"the spec says {spec.shape}, the model has {tuple(matrix(old).shape)}", where=f"config.json: {site}"
            )
        new = QLinear(spec, old.bias is not None, dtype, input=settings.inputs.get(site))
        setattr(model.get_submodule(parent), leaf, new)


def _linear(model: nn.Module, site: str) -> Any:
    from lowbit.models.graph import is_linear

    try:
        module = model.get_submodule(site)
    except AttributeError:
        module = None
    if module is None or not is_linear(module):
        raise CheckpointError("the model has no such linear", where=f"config.json: {site}")
    return module
