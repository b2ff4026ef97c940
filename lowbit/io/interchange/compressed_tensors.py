"""The layout of compressed-tensors, which llm-compressor writes and vLLM, SGLang and transformers read.

    weight_packed        int32 (out, ceil(in * bits / 32)): a little-endian bit stream a row, as in a QTensor
                         uint8 (out, in / 2): two 4-bit floats a byte, the even one below
    weight               int8 or float8_e4m3fn (out, in), for int-quantized, float-quantized and mxfp8-quantized
    weight_scale         one a tensor (1), row (out, 1), group (out, in / group) or tile
    weight_zero_point    int32 (ceil(out * bits / 32), groups), packed down the rows; int8 like the scales elsewhere
    weight_shape         int64 (2)
    weight_global_scale  float32 (1), nvfp4: what the e4m3 scales are divided by
    input_scale          float32 (1), and input_zero_point int8 (1), where the range of the inputs was measured

Values are ``scale * (code - zero)`` in the scale's dtype, and held bit for bit. Of nvfp4 all codes are; its one float32
a tensor, which a QTensor multiplies by, is stored as its reciprocal, so that values agree to 2^-23 of themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lowbit.arrays import Tensor
from lowbit.errors import CheckpointError, ExportError
from lowbit.formats.activation import ActivationFormat, Input
from lowbit.formats.heads import CacheFormat
from lowbit.formats.qtensor import Affine, QTensor
from lowbit.formats.spec import Spec
from lowbit.io.interchange.base import LowBitModel, Refusal
from lowbit.io.interchange.compressed_scheme import NVFP4, Scheme, scheme_from, scheme_of
from lowbit.io.interchange.compressed_weights import (
    Reader,
    pack_floats,
    pack_input,
    pack_integers,
    unpack_floats,
    unpack_input,
    unpack_integers,
)
from lowbit.io.interchange.fused import require_alike

VERSION = "0.20.0"
"""The compressed-tensors whose files these are. Until May 2026 words of 3, 5, 6 and 7 bits held whole codes only."""
_MAX_PATTERN, _MAX_REPEATS = 1 << 12, 4


@dataclass(frozen=True)
class Group:
    """A scheme and the linears that have it: ``Linear`` for all, names, or ``re:`` and a pattern of names."""

    targets: tuple[str, ...]
    scheme: Scheme


@dataclass(frozen=True)
class CompressedTensors:
    """compressed-tensors with the schemes of one model."""

    name: ClassVar[str] = "compressed-tensors"
    suffixes: ClassVar[frozenset[str]] = frozenset(
        {"weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale",
         "input_scale", "input_zero_point"}
    )  # fmt: skip
    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()
    kv: bool = False
    lost: tuple[str, ...] = ()

    @classmethod
    def refusal(cls, spec: Spec, input: ActivationFormat | None = None) -> Refusal | None:
        """None when there is a scheme for this linear."""
        found = scheme_of(spec, input)
        return found if isinstance(found, Refusal) else None

    @classmethod
    def for_model(cls, model: LowBitModel) -> CompressedTensors:
        """A group a scheme; ExportError where vLLM fuses linears whose schemes differ (q/k/v, gate/up, experts)."""
        schemes: dict[str, Scheme] = {}
        for site, spec in model.specs.items():
            found = scheme_of(spec, model.inputs.get(site))
            if isinstance(found, Refusal):
                raise ExportError(found.why, where=site, fix=found.fix)
            schemes[site] = found
        if not schemes:
            raise ExportError("has no low-bit linears", where=model.architecture)
        require_alike({**dict.fromkeys(model.dense, "16 bit"), **{site: str(s) for site, s in schemes.items()}})
        by_scheme: dict[Scheme, list[str]] = {}
        for site, scheme in schemes.items():
            by_scheme.setdefault(scheme, []).append(site)
        groups = tuple(
            Group(("Linear",) if len(by_scheme) == 1 else tuple(sites), scheme) for scheme, sites in by_scheme.items()
        )
        kv, lost = _cache(model.kv)
        if any(scheme.format == NVFP4 for scheme in by_scheme):
            lost += ("nvfp4's one scale a tensor is stored as its reciprocal in float32: values differ by up to 2^-23",)
        if len(by_scheme) > 1 and any(scheme.packed_zeros for scheme in by_scheme):
            lost += ("transformers 5.23 loads formats with zero points only where all linears have the same",)
        return cls(groups, model.dense, kv, lost)

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> CompressedTensors:
        where = "quantization_config"
        held, default = config.get("config_groups"), config.get("format", "dense")
        if not isinstance(held, Mapping) or not held or not isinstance(default, str):
            raise CheckpointError("config_groups is no table of schemes", where=where)
        if config.get("sparsity_config") or config.get("transform_config"):
            raise CheckpointError("sparse or transformed weights are not read", where=where, fix="a dense model")
        groups = []
        for name, group in held.items():
            if not isinstance(group, Mapping):
                raise CheckpointError("is no scheme", where=f"{where}.config_groups.{name}")
            at = f"{where}.config_groups.{name}"
            groups.append(Group(_targets(group.get("targets"), f"{at}.targets"), scheme_from(group, default, at)))
        ignore = _targets(config.get("ignore") or [], f"{where}.ignore")
        kv = config.get("kv_cache_scheme")
        lost = () if kv is None else ("the files round the KV cache (kv_cache_scheme): add a KV format of lowbit's",)
        return cls(tuple(groups), ignore, kv is not None, lost)

    def config(self) -> dict[str, Any]:
        formats = {group.scheme.format for group in self.groups}
        return {
            "quant_method": "compressed-tensors", "version": VERSION, "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": {f"group_{i}": g.scheme.to_json(list(g.targets)) for i, g in enumerate(self.groups)},
            "ignore": list(self.ignore), "kv_cache_scheme": _FP8_CACHE if self.kv else None,
            "global_compression_ratio": None, **({"dequantize": True} if self._only_dense else {}),
        }  # fmt: skip

    @property
    def _only_dense(self) -> bool:
        """Whether transformers loads the files if told to make dense matrices of them, and not otherwise.

        5.23 with compressed-tensors 0.20 expects zeros of pack-quantized that are not packed, which no file has.
        """
        return len(self.groups) == 1 and self.groups[0].scheme.packed_zeros

    def files(self) -> dict[str, Any]:
        return {}

    def notes(self) -> tuple[str, ...]:
        return self.lost

    def pack(self, site: str, q: QTensor, input: Input | None = None) -> dict[str, Tensor]:
        """Cost a few passes over the codes. ExportError when the linear has another scheme than the model's here."""
        scheme = scheme_of(q.spec(), None if input is None else input.format)
        if scheme != self._scheme(site):
            why = scheme.why if isinstance(scheme, Refusal) else "it differs from what for_model saw"
            raise ExportError("is not in the scheme of its group", where=site, why=why)
        held = pack_integers(q, scheme) if isinstance(q, Affine) else pack_floats(site, q, scheme)
        return held if input is None else held | pack_input(site, input)

    def unpack(self, site: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> tuple[QTensor, Input | None]:
        scheme = self._scheme(site)
        if scheme is None:
            raise CheckpointError("no config group targets it", where=site, why="its codes would have no meaning")
        block = scheme.block
        if block.kind == "group" and shape[1] % block.size[0]:
            raise CheckpointError(f"{shape[1]} columns are no whole groups of {block.size[0]}", where=site)
        read = Reader(site, shape, tensors)
        q = unpack_integers(read, scheme) if scheme.kind == "int" else unpack_floats(read, scheme)
        return q, None if scheme.input is None else unpack_input(read, scheme.input)

    def _scheme(self, site: str) -> Scheme | None:
        """That of the closest target: a name, before a pattern, before all linears; none for what is ignored."""
        schemes = {target: group.scheme for group in self.groups for target in group.targets}
        return None if _closest(self.ignore, site) else schemes.get(_closest(schemes, site))


# --- models ----------------------------------------------------------------------------------------------------------


_FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": True}


def _cache(kv: CacheFormat | None) -> tuple[bool, tuple[str, ...]]:
    """Whether the config asks for an fp8 cache, and what it cannot say."""
    if kv is None:
        return False, ()
    if all(f.startswith("fp8-e4m3") and "hadamard" not in f for f in (kv.key, kv.value)):
        return True, (f"the KV cache has one fp8 scale a tensor in these files, not those of {kv}",)
    return False, (f"the KV cache is not rounded in these files ({kv})",)


def _targets(value: Any, where: str) -> tuple[str, ...]:
    """Names and patterns from an untrusted file; patterns that could take for ever are refused."""
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise CheckpointError("is no list of names", where=where)
    for target in value:
        if target.startswith("re:") and (why := _risk(target[3:])):
            raise CheckpointError(f"the pattern {target!r:.80} {why}", where=where, fix="names, or simpler patterns")
    return tuple(value)


def _risk(pattern: str) -> str:
    """Why a pattern is not run over names, or nothing: what is repeated holds no repetition."""
    if len(pattern) > _MAX_PATTERN or len(re.findall(r"[*+{]", pattern)) > _MAX_REPEATS:
        return "repeats too often"
    if re.search(r"\)[*+{?]|\(\?(?!:)|\\[1-9]", pattern):
        return "repeats a group"
    try:
        re.compile(pattern)
    except re.error as error:
        return f"is malformed: {error}"
    return ""


def _closest(targets: Iterable[str], site: str) -> str:
    """The target that means a site most narrowly, or nothing."""
    held = set(targets)
    if site in held:
        return site
    patterns = sorted(t for t in held if t.startswith("re:") and re.match(t[3:], site))
    return patterns[0] if patterns else "Linear" if "Linear" in held else ""
