"""The AWQ layout (``version: gemm``): 4-bit codes, float16 scales and integer zeros a group of inputs.

Of a linear (out, in) with G inputs a group (docs/reference/layouts-gptq-awq.md):

    qweight   int32 (in, out/8)         codes of eight outputs in a word, in the order 0 2 4 6 1 3 5 7 from the lowest
    qzeros    int32 (in/G, out/8)       zeros, in the same order
    scales    float16 (in/G, out)

    w = scales[g] * (q - zero[g])

A symmetric matrix is written with zeros of 8, which is the same number for number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lowbit.arrays import Int, Tensor, UInt8
from lowbit.errors import CheckpointError, ExportError
from lowbit.formats.activation import ActivationFormat, Input
from lowbit.formats.pack import Codes
from lowbit.formats.qtensor import Affine, QTensor
from lowbit.formats.spec import Spec
from lowbit.io.interchange.affine import Grouped, Kind, field, refusal, scales, tensor, wrong
from lowbit.io.interchange.base import LowBitModel, Refusal
from lowbit.io.interchange.fused import require_alike
from lowbit.io.interchange.words import pack_words, unpack_words

BITS = 4
_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
"""Which of eight outputs each nibble of a word holds, from the lowest."""


@dataclass(frozen=True)
class Awq:
    """The settings of a model: one group size for all."""

    group: int
    dense: tuple[str, ...] = ()
    kv: str = ""

    name: ClassVar[str] = "awq"
    suffixes: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales"})

    @classmethod
    def refusal(cls, spec: Spec, input: ActivationFormat | None = None) -> Refusal | None:
        """See :class:`~lowbit.io.interchange.base.Layout`; whether scales are float16 numbers ``pack`` finds out."""
        if spec.node == "Gathered":
            return Refusal("it acts on reordered inputs, the layout has no order", "--to gptq")
        return refusal(spec, (BITS,), input)

    @classmethod
    def for_model(cls, model: LowBitModel) -> Awq:
        """See :class:`~lowbit.io.interchange.base.Layout`."""
        if not model.specs:
            raise ExportError("no linear is in a low-bit format", where=model.architecture, fix="--to bf16")
        kinds: dict[str, Kind] = {}
        for site, spec in model.specs.items():
            if refused := cls.refusal(spec, model.inputs.get(site)):
                raise ExportError(refused.why, where=site, fix=refused.fix)
            kinds[site] = Kind.of(spec)
            first = next(iter(kinds))
            if kinds[site] != kinds[first]:
                raise ExportError(
                    f"is {kinds[site]}, {first} is {kinds[first]}", where=site,
                    why="AWQ files have one group size", fix="one format for all, or --to gptq",
                )  # fmt: skip
            if "." not in site:
                raise ExportError("readers keep the head in 16 bit", where=site, fix="keep it, or --to gptq")
        require_alike({**kinds, **dict.fromkeys(model.dense, "16 bit")})
        for kept in model.dense:
            if hidden := next((site for site in kinds if kept in site), None):
                raise ExportError(
                    f"stays in 16 bit, and {hidden} does not", where=kept,
                    why="AWQ files name what stays by parts of names, and this one is a part of the other",
                    fix="one format for both, or --to gptq",
                )  # fmt: skip
        return cls(next(iter(kinds.values())).group, model.dense, str(model.kv or ""))

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Awq:
        """See :class:`~lowbit.io.interchange.base.Layout`; the old names ``w_bit`` and ``q_group_size`` are read."""
        if config.get("quant_method", "awq") != "awq":
            raise wrong("quant_method", config["quant_method"], "that is another layout")
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            raise wrong("version", version, "gemm is what is read", "the gemm files of the model")
        bits = field(config, "w_bit" if "bits" not in config else "bits", int)
        group = field(config, "q_group_size" if "group_size" not in config else "group_size", int)
        if bits != BITS:
            raise wrong("bits", bits, f"the layout has {BITS}")
        if group != -1 and group < 1:
            raise wrong("group_size", group, "a number of inputs, or -1 for all of a row")
        if not field(config, "zero_point", bool, True):
            raise wrong("zero_point", False, "readers disagree on the zero that is meant then")
        return cls(group)

    def config(self) -> dict[str, Any]:
        """See :class:`~lowbit.io.interchange.base.Layout`."""
        return {
            "quant_method": "awq", "bits": BITS, "group_size": self.group, "zero_point": True, "version": "gemm",
            "format": "gemm", "modules_to_not_convert": list(self.dense) or None,
        }  # fmt: skip

    def files(self) -> dict[str, Any]:
        """None: readers look into config.json."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """See :class:`~lowbit.io.interchange.base.Layout`."""
        kv = f"the KV format {self.kv} is not in the files: engines have an option of their own for their cache"
        return (kv,) if self.kv else ()

    def pack(self, site: str, q: QTensor, input: Input | None = None) -> dict[str, Tensor]:
        """See :class:`~lowbit.io.interchange.base.Layout`; memory about three bytes a code."""
        if refused := self.refusal(q.spec(), None if input is None else input.format):
            raise ExportError(refused.why, where=site, fix=refused.fix)
        assert isinstance(q, Affine)  # by its spec
        held = Grouped.of(site, q)
        zeros = torch.full_like(held.scales, 8, dtype=torch.uint8) if held.zeros is None else held.zeros
        return {
            "qweight": _interleaved(held.codes.unpack().t()), "qzeros": _interleaved(zeros.t()),
            "scales": held.scales.t().contiguous(),
        }  # fmt: skip

    def unpack(self, site: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> tuple[QTensor, Input | None]:
        """See :class:`~lowbit.io.interchange.base.Layout`."""
        rows, columns = shape
        size = columns if self.group == -1 else self.group
        if rows % 8 or columns % size:
            raise CheckpointError(
                f"a matrix of {shape} has no place for eight outputs a word and groups of {size} inputs", where=site
            )
        qweight = tensor(site, tensors, "qweight", (columns, rows // 8), (torch.int32,))
        qzeros = tensor(site, tensors, "qzeros", (columns // size, rows // 8), (torch.int32,))
        found = scales(site, tensors, columns // size, rows)
        codes = Codes.of(_in_order(qweight).t(), 1 << BITS)
        return Grouped(codes, found, _in_order(qzeros).t()).affine(shape, self.group), None


def _interleaved(codes: UInt8[Tensor, "rows out"]) -> Int[Tensor, "rows words"]:
    return pack_words(codes.reshape(codes.shape[0], -1, 8)[..., _ORDER].flatten(1), BITS)


def _in_order(packed: Int[Tensor, "rows words"]) -> UInt8[Tensor, "rows out"]:
    found = unpack_words(packed, BITS).view(packed.shape[0], -1, 8)
    return found[..., _ORDER.argsort()].flatten(1)
