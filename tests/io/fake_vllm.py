"""The part of vLLM that a quantization plug-in meets, on a CPU: its registry, its linears, two of its own methods.

The interface is vLLM's; the methods multiply what they were given as the layouts are documented, bit by bit.
"""

from __future__ import annotations

import importlib.machinery
import logging
import sys
import types
from abc import ABC, abstractmethod
from typing import Any

import pytest
import torch
from torch import nn

MODULES = (
    "vllm", "vllm.logger", "vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.layers.linear",
    "vllm.model_executor.layers.quantization", "vllm.model_executor.layers.quantization.base_config",
)  # fmt: skip
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class QuantizationConfig(ABC):
    def __init__(self) -> None:
        super().__init__()
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...

    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...

    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig: ...

    @classmethod
    def override_quantization_method(cls, config: dict[str, Any], user: str | None, hf: Any = None) -> str | None:
        return None

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any: ...


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer: nn.Module, *args: Any, **extra: Any) -> None: ...

    @abstractmethod
    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor: ...

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return


class LinearMethodBase(QuantizeMethodBase): ...


def parameter(shape: tuple[int, ...], dtype: torch.dtype, loader: Any, **attributes: Any) -> nn.Parameter:
    made = nn.Parameter(torch.full(shape, -1).to(dtype), requires_grad=False)
    made.__dict__.update(weight_loader=loader, **attributes)
    return made


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer: nn.Module, *args: Any, **extra: Any) -> None:
        shape = (sum(extra["output_partition_sizes"]), extra["input_size_per_partition"])
        layer.weight = parameter(shape, extra["params_dtype"], extra["weight_loader"], output_dim=0, input_dim=1)

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.nn.functional.linear(args[0], layer.weight, args[1])


class LinearBase(nn.Module):
    """A column-parallel linear, fused or not; ``rank`` of ``ranks`` devices holds its share of every member."""

    def __init__(
        self, inputs: int, outputs: list[int], config: Any, prefix: str, rank: int = 0, ranks: int = 1
    ) -> None:
        super().__init__()
        self.outputs, self.rank, self.ranks = outputs, rank, ranks
        self.quant_method = config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            layer=self, input_size_per_partition=inputs, output_partition_sizes=[n // ranks for n in outputs],
            input_size=inputs, output_size=sum(outputs), params_dtype=torch.float32, weight_loader=self.weight_loader,
        )  # fmt: skip

    def weight_loader(self, target: Any, loaded: torch.Tensor, shard: str | int | None = None) -> None:
        raise AssertionError("the loader of methods that WEIGHT_LOADER_V2_SUPPORTED does not name")

    def weight_loader_v2(self, target: Any, loaded: torch.Tensor, shard: str | int | None = None) -> None:
        at = {"q": 0, "k": 1, "v": 2, None: 0}.get(shard, shard)
        dim = getattr(target, "output_dim", None)
        place = target.data
        if dim is not None:
            factor = target.packed_factor if getattr(target, "packed_dim", None) == dim else 1
            size = self.outputs[at] // self.ranks // factor
            place = place.narrow(dim, sum(self.outputs[:at]) // self.ranks // factor, size)
            loaded = loaded.narrow(dim, self.rank * size, size)
        assert place.shape == loaded.shape
        place.copy_(loaded)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x, None)


class InTree(QuantizationConfig):
    """A config of vLLM's own, with the fields that it insists on."""

    fields: tuple[str, ...]
    name: str
    quant_method: str

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.bits, self.group, *_ = (config[field] for field in self.fields)
        self.said = config

    def get_name(self) -> str:
        return self.name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.half]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        return cls(config)

    @classmethod
    def override_quantization_method(cls, config: dict[str, Any], user: str | None, hf: Any = None) -> str | None:
        return cls.name if config["quant_method"] == cls.quant_method and user is None else None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        parent, _, leaf = prefix.rpartition(".")
        names = [f"{parent}.{name}" for name in self.packed_modules_mapping.get(leaf, [leaf])]
        assert isinstance(layer, LinearBase)
        assert all(name in self.said.get("modules_in_block_to_quantize", names) for name in names)
        return self.method(self.bits, self.group)

    method: Any


class Marlin(LinearMethodBase):
    """What both methods share: their parameters, as ``create_weights`` of vLLM makes them."""

    def __init__(self, bits: int, group: int) -> None:
        self.bits, self.group = bits, group
        self.shifts = torch.arange(0, 32, bits, dtype=torch.int32)

    def sizes(self, extra: dict[str, Any]) -> tuple[int, int, int]:
        inputs, outputs = extra["input_size_per_partition"], sum(extra["output_partition_sizes"])
        assert inputs % 128 == 0
        assert outputs % 64 == 0
        return inputs, outputs, 1 if self.group == -1 else inputs // self.group

    def spread(self, layer: nn.Module, values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(layer.inputs // len(values), 0)


class GPTQMarlinLinearMethod(Marlin):
    def create_weights(self, layer: nn.Module, *args: Any, **extra: Any) -> None:
        inputs, outputs, groups = self.sizes(extra)
        layer.inputs, load, packed = inputs, extra["weight_loader"], 32 // self.bits
        layer.qweight = parameter((inputs // packed, outputs), torch.int32, load, output_dim=1, packed_dim=0)
        layer.scales = parameter((groups, outputs), extra["params_dtype"], load, output_dim=1)
        shape = (groups, outputs // packed)
        layer.qzeros = parameter(shape, torch.int32, load, output_dim=1, packed_dim=1, packed_factor=packed)

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        codes = (layer.qweight.unsqueeze(1) >> self.shifts[:, None] & (1 << self.bits) - 1).flatten(0, 1)
        return args[0] @ ((codes - (1 << self.bits - 1)) * self.spread(layer, layer.scales))


class GPTQMarlinConfig(InTree):
    fields, name, quant_method = ("bits", "group_size", "desc_act", "sym"), "gptq_marlin", "gptq"
    method = GPTQMarlinLinearMethod


class AWQMarlinLinearMethod(Marlin):
    def create_weights(self, layer: nn.Module, *args: Any, **extra: Any) -> None:
        inputs, outputs, groups = self.sizes(extra)
        layer.inputs, load = inputs, extra["weight_loader"]
        packed = {"output_dim": 1, "packed_dim": 1, "packed_factor": 8}
        layer.qweight = parameter((inputs, outputs // 8), torch.int32, load, **packed)
        layer.qzeros = parameter((groups, outputs // 8), torch.int32, load, **packed)
        layer.scales = parameter((groups, outputs), extra["params_dtype"], load, output_dim=1)

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        at = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
        codes, zeros = (
            (words.unsqueeze(-1) >> self.shifts & 15)[..., at].flatten(1) for words in (layer.qweight, layer.qzeros)
        )
        return args[0] @ ((codes - self.spread(layer, zeros)) * self.spread(layer, layer.scales))


class AWQMarlinConfig(InTree):
    fields, name, quant_method = ("bits", "group_size", "zero_point"), "awq_marlin", "awq"
    method = AWQMarlinLinearMethod


def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put the tree in place of vLLM; returns its ``quantization`` module."""
    for name in MODULES:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, leaf = name.rpartition(".")
        if parent:
            monkeypatch.setattr(sys.modules[parent], leaf, module, raising=False)
    sys.modules["vllm.logger"].__dict__["init_logger"] = logging.getLogger
    linear = sys.modules["vllm.model_executor.layers.linear"]
    linear.__dict__.update(
        LinearBase=LinearBase, LinearMethodBase=LinearMethodBase, UnquantizedLinearMethod=UnquantizedLinearMethod,
        WEIGHT_LOADER_V2_SUPPORTED=["UnquantizedLinearMethod", "GPTQMarlinLinearMethod", "AWQMarlinLinearMethod"],
    )  # fmt: skip
    base = sys.modules["vllm.model_executor.layers.quantization.base_config"]
    base.__dict__.update(QuantizationConfig=QuantizationConfig, QuantizeMethodBase=QuantizeMethodBase)
    quantization = sys.modules["vllm.model_executor.layers.quantization"]
    methods: dict[str, type[QuantizationConfig]] = {"gptq_marlin": GPTQMarlinConfig, "awq_marlin": AWQMarlinConfig}
    names = list(methods)

    def register(name: str) -> Any:
        if name in names:
            raise ValueError(f"The quantization method {name} already exists.")

        def keep(cls: type[QuantizationConfig]) -> type[QuantizationConfig]:
            assert issubclass(cls, QuantizationConfig)
            methods[name] = cls
            names.append(name)
            return cls

        return keep

    quantization.__dict__.update(
        QUANTIZATION_METHODS=names, register_quantization_config=register, get_quantization_config=methods.__getitem__
    )
    for name in [name for name in sys.modules if name == "lowbit.io.vllm_linear"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lowbit.io.vllm_linear", None)  # forgotten again after the test
    monkeypatch.delitem(sys.modules, "lowbit.io.vllm_linear")
    return quantization
