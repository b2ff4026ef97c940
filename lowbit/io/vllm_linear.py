"""What vLLM sees of lowbit: a quantization config, and a linear method that hands over to one of vLLM's own.

Imported by :func:`lowbit.io.vllm_plugin.register` where vLLM is there. While a checkpoint is read, a linear has one
empty parameter for every part of a QTensor, under the part's own name; what is loaded into it stays on the CPU. Then
:meth:`LowbitLinear.process_weights_after_loading` makes the parameters of vLLM's own method and feeds them through its
own loaders, which cut them to the share of a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.linear import (
    WEIGHT_LOADER_V2_SUPPORTED,
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from lowbit.arrays import Tensor
from lowbit.errors import ExportError
from lowbit.formats.qtensor import build
from lowbit.formats.spec import Spec
from lowbit.io.layout import Settings
from lowbit.io.vllm_plugin import NAME, Part, Target, member, settings_of, sites_of, target, tensors

logger = init_logger("vllm.lowbit")


class LowbitConfig(QuantizationConfig):
    """``quantization_config`` of a native checkpoint."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.specs: Mapping[str, Spec] = settings.specs
        self.packed_modules_mapping: dict[str, list[str]] = getattr(self, "packed_modules_mapping", {})
        if settings.kv is not None:
            logger.warning("the checkpoint asks for the KV format %s: use vLLM's --kv-cache-dtype", settings.kv)

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.half, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowbitConfig:
        return cls(settings_of(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Name sites as vLLM's class does."""
        self.specs = hf_to_vllm_mapper.apply_dict(dict(self.specs))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of a layer; raises ExportError for low-bit weights in layers other than linears."""
        if not isinstance(layer, LinearBase):
            below = next((site for site in self.specs if site == prefix or site.startswith(f"{prefix}.")), None)
            if below is not None:
                raise ExportError(
                    f"is in a {type(layer).__name__}, which the plug-in does not run", where=below,
                    fix="lowbit export OUT --to gptq, or keep it in 16 bit",
                )  # fmt: skip
            return None
        sites = sites_of(prefix, self.packed_modules_mapping, self.specs)
        if not sites:
            return UnquantizedLinearMethod()
        return LowbitLinear({site: self.specs[site] for site in sites}, prefix, self.packed_modules_mapping)


class LowbitLinear(LinearMethodBase):
    """The method of one linear, or of several that vLLM fuses."""

    def __init__(self, specs: dict[str, Spec], prefix: str, fused: dict[str, list[str]]) -> None:
        self.specs, self.prefix, self.fused = specs, prefix, fused
        self.shards: dict[str | int | None, dict[str, Tensor]] = {}
        self.method: Any = None

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """Empty parameters ``weight.PATH`` for every part of the specs."""
        self.device = torch.empty(0).device  # vLLM's, by its context
        self.dtype, self.part = params_dtype, Part(input_size_per_partition, sum(output_partition_sizes))
        self.extra = {
            "input_size_per_partition": input_size_per_partition, "output_partition_sizes": output_partition_sizes,
            "input_size": input_size, "output_size": output_size, "params_dtype": params_dtype, **extra,
        }  # fmt: skip
        layer.register_module("weight", self._places())

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Turn what was loaded into the parameters of vLLM's method, a shard at a time."""
        del layer.weight
        to = target(self.specs, self.part)
        with torch.device(self.device):
            self.method = self._method(to, layer)
            if isinstance(self.method, UnquantizedLinearMethod):
                to = Target((), None, to.why)
            extra = dict(self.extra)
            if type(self.method).__name__ in WEIGHT_LOADER_V2_SUPPORTED and hasattr(layer, "weight_loader_v2"):
                extra["weight_loader"] = layer.weight_loader_v2
            self.method.create_weights(layer, **extra)
        share = getattr(layer, "update_param_tp_status", None)
        if share is not None:  # what the layer does with parameters that it made itself
            share()
        for shard in list(self.shards):
            site = member(tuple(self.specs), shard)
            prefix = f"{site}.weight."
            parts = {prefix + path: part for path, part in self.shards.pop(shard).items()}
            q = build(self.specs[site], parts, prefix)
            for name, value in tensors(to, site, q, self.dtype).items():
                parameter = getattr(layer, name)
                parameter.weight_loader(parameter, value, *([] if shard is None else [shard]))
        self.method.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = self.method.apply(layer, x, bias)
        return y

    def _method(self, to: Target, layer: nn.Module) -> Any:
        """vLLM's method for a target, by the first name under which it has one for this machine."""
        config = to.config(tuple(self.specs))
        for name in to.methods:
            if name not in quantization.QUANTIZATION_METHODS:
                continue
            cls = quantization.get_quantization_config(name)
            if cls.override_quantization_method(config, None) == name:
                settings = cls.from_config(config)
                settings.packed_modules_mapping = self.fused
                return settings.get_quant_method(layer, self.prefix)
        why = to.why or f"this vLLM has none of {', '.join(to.methods)} here"
        logger.warning("%s is decoded to %s and saves no memory: %s", self.prefix, self.dtype, why)
        return UnquantizedLinearMethod()

    def _places(self) -> nn.Module:
        root = nn.Module()
        leaves = {path: leaf for spec in self.specs.values() for path, leaf in spec.paths().items()}
        for path, stored in leaves.items():
            *parents, leaf = path.split(".")
            owner = root
            for name in parents:
                if name not in owner._modules:
                    owner.register_module(name, nn.Module())
                owner = owner.get_submodule(name)
            place = nn.Parameter(torch.empty(0, dtype=getattr(torch, stored.dtype)), requires_grad=False)
            place.weight_loader = self._keeper(path)  # type: ignore[attr-defined]
            owner.register_parameter(leaf, place)
        return root

    def _keeper(self, path: str) -> Any:
        def keep(parameter: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
            self.shards.setdefault(shard, {})[path] = loaded.cpu()

        return keep
