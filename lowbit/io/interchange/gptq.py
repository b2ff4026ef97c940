"""The GPTQ layouts: ``gptq`` (version 1, zeros stored less one) and ``gptq-v2`` (zeros as they are).

Of a linear (out, in) with b = 2, 3, 4 or 8 bits and G inputs a group (docs/reference/layouts-gptq-awq.md):

    qweight   int32 (in*b/32, out)       codes of consecutive inputs in a word, the first one lowest
    qzeros    int32 (groups, out*b/32)   zeros of consecutive outputs
    scales    float16 (groups, out)
    g_idx     int32 (in)                 the group of every input

    w = scales[g] * (q - zero[g]);  a symmetric file has zero = 2^(b-1) throughout

Groups of inputs that do not lie side by side (``desc_act``) are ``Gathered(index, ones, Affine)`` here: inputs in the
order of their groups.

Version 1 has no zero of 0. Stored, it is all ones, from which readers make 0 or 2^b, or carry into the neighbour:
AutoGPTQ adds one and masks, the CUDA kernels of exllama add one, GPTQModel adds 0x11111111 to the word. So reading one
is refused; writing one, codes and zero of such a group become one more, which is the same values, and where the group
has the largest code already, it is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import lowbit
from lowbit.arrays import Int, Tensor, UInt8
from lowbit.errors import CheckpointError, ExportError
from lowbit.formats.activation import ActivationFormat, Input
from lowbit.formats.pack import Codes
from lowbit.formats.qtensor import Affine, Gathered, QTensor, Raw
from lowbit.formats.spec import Spec
from lowbit.io.interchange.affine import Grouped, Kind, field, refusal, scales, tensor, wrong
from lowbit.io.interchange.base import LowBitModel, Refusal
from lowbit.io.interchange.fused import fused_groups, require_alike
from lowbit.io.interchange.words import pack_words, run_of, stream, unpack_words, words

BITS = (2, 3, 4, 8)
_BLOCK = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Gptq:
    """Version 1, which every reader knows."""

    kind: Kind
    """Of all sites but ``others``."""
    sym: bool
    desc_act: bool = False
    lm_head: bool = False
    others: tuple[tuple[Kind, tuple[str, ...]], ...] = ()
    """Sites of other kinds, which ``dynamic`` names: GPTQModel, vLLM and SGLang know it."""
    varies: bool = False
    """Whether tensors may be of another kind than ``kind``, each of what its shapes say."""
    dense: tuple[str, ...] = ()
    """Sites in blocks that stay in 16 bit."""
    modules: tuple[str, ...] = ()
    """The low-bit sites by their names in a block, where every block has the same and ``dense`` has none of them."""
    kv: str = ""

    name: ClassVar[str] = "gptq"
    suffixes: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    checkpoint_format: ClassVar[str] = "gptq"
    less: ClassVar[int] = 1
    """What is subtracted from a zero before it is stored."""

    @classmethod
    def refusal(cls, spec: Spec, input: ActivationFormat | None = None) -> Refusal | None:
        """See :class:`~lowbit.io.interchange.base.Layout`; values (scales, zeros) are looked at by ``pack``."""
        inner = spec.child("inner")
        if spec.node != "Gathered" or inner is None:
            return refusal(spec, BITS, input)
        scale = spec.child("scale")
        if inner.shape != spec.shape or scale is None or scale.node != "Raw":
            return Refusal("it picks and adds inputs, the layout can only reorder them", "--to bf16")
        return refusal(inner, BITS, input)

    @classmethod
    def for_model(cls, model: LowBitModel) -> Gptq:
        """See :class:`~lowbit.io.interchange.base.Layout`."""
        if not model.specs:
            raise ExportError("no linear is in a low-bit format", where=model.architecture, fix="--to bf16")
        kinds: dict[str, Kind] = {}
        for site, spec in model.specs.items():
            if refused := cls.refusal(spec, model.inputs.get(site)):
                raise ExportError(refused.why, where=site, fix=refused.fix)
            kinds[site] = Kind.of(_inner(spec))
        inside = tuple(site for site in model.dense if _BLOCK.search(site))
        require_alike({**kinds, **dict.fromkeys(inside, "16 bit")})
        (common, _), *_ = Counter(kinds.values()).most_common(1)
        others: dict[Kind, list[str]] = {}
        for site, kind in kinds.items():
            if kind != common:
                others.setdefault(kind, []).append(site)
        return cls(
            common,
            sym=all(_inner(spec).leaf("zero") is None for spec in model.specs.values()),
            desc_act=any(spec.node == "Gathered" and kinds[site].group > 0 for site, spec in model.specs.items()),
            lm_head=any(not _BLOCK.search(site) for site in kinds),
            others=tuple((kind, tuple(sites)) for kind, sites in others.items()),
            varies=bool(others), dense=inside, modules=_modules(kinds, inside), kv=str(model.kv or ""),
        )  # fmt: skip

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Gptq:
        """See :class:`~lowbit.io.interchange.base.Layout`; patterns of ``dynamic`` are not run, shapes tell."""
        if config.get("quant_method", "gptq") != "gptq":
            raise wrong("quant_method", config["quant_method"], "that is another layout")
        found = config.get("checkpoint_format") or config.get("format") or "gptq"
        if found != cls.checkpoint_format:
            raise wrong("checkpoint_format", found, f"{cls.name} is {cls.checkpoint_format!r}: zeros differ")
        if (words_of := config.get("pack_dtype") or "int32") != "int32":
            raise wrong("pack_dtype", words_of, "words of 32 bits are what is read", "GPTQModel can repack it")
        bits, group = field(config, "bits", int), field(config, "group_size", int)
        if bits not in BITS:
            raise wrong("bits", bits, f"the layout has {BITS}")
        if group != -1 and group < 1:
            raise wrong("group_size", group, "a number of inputs, or -1 for all of a row")
        dynamic = field(config, "dynamic", dict, {})
        return cls(
            Kind(bits, group), sym=field(config, "sym", bool), desc_act=field(config, "desc_act", bool, False),
            lm_head=field(config, "lm_head", bool, False),
            varies=any(not str(pattern).startswith("-:") for pattern in dynamic),
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """See :class:`~lowbit.io.interchange.base.Layout`.

        What only describes how codes were chosen (``damp_percent``, ``true_sequential``) no loader requires, and other
        methods than GPTQ have no such thing: it is left out.
        """
        said: dict[str, Any] = {
            "quant_method": "gptq", "bits": self.kind.bits, "group_size": self.kind.group, "sym": self.sym,
            "desc_act": self.desc_act, "checkpoint_format": self.checkpoint_format, "format": self.checkpoint_format,
            "pack_dtype": "int32", "lm_head": self.lm_head, "meta": {"quantizer": [f"lowbit:{lowbit.__version__}"]},
        }  # fmt: skip
        if self.modules and self.dense:
            said["modules_in_block_to_quantize"] = [list(self.modules)]
        dynamic: dict[str, dict[str, int]] = {}
        if self.dense:
            dynamic["-:" + _pattern(self.dense)] = {}
        for kind, sites in self.others:
            dynamic["+:" + _pattern(sites)] = {"bits": kind.bits, "group_size": kind.group}
        return {**said, "dynamic": dynamic} if dynamic else said

    def files(self) -> dict[str, Any]:
        """``quantize_config.json``, in which AutoGPTQ and its heirs look for the same."""
        return {"quantize_config.json": self.config()}

    def notes(self) -> tuple[str, ...]:
        """See :class:`~lowbit.io.interchange.base.Layout`."""
        kv = f"the KV format {self.kv} is not in the files: engines have an option of their own for their cache"
        asymmetric = "GPTQModel reads asymmetric files of version 1 only if it wrote them; --to gptq-v2 is for it"
        said = [kv] if self.kv else []
        return (*said, asymmetric) if self.less and not self.sym else tuple(said)

    def pack(self, site: str, q: QTensor, input: Input | None = None) -> dict[str, Tensor]:
        """See :class:`~lowbit.io.interchange.base.Layout`; memory about twice the packed codes."""
        if refused := self.refusal(q.spec(), None if input is None else input.format):
            raise ExportError(refused.why, where=site, fix=refused.fix)
        inner = q.inner if isinstance(q, Gathered) else q
        assert isinstance(inner, Affine)  # by its spec
        kind = Kind.of(inner.spec())
        held = Grouped.of(site, inner)
        if self.less:
            held = held.without_zero(site)
        groups = held.scales.shape[1]
        in_order = torch.arange(q.shape[1], dtype=torch.int32) // (kind.group if kind.group > 0 else q.shape[1])
        packed, g_idx = held.codes.data, in_order
        if isinstance(q, Gathered):
            order = _order(site, q)
            g_idx = torch.empty_like(in_order)
            g_idx[order] = in_order
            packed = Codes.of(_put_back(held.codes.unpack(), order), held.codes.levels).data
        zeros = torch.full((groups, q.shape[0]), 1 << (kind.bits - 1), dtype=torch.uint8)
        if held.zeros is not None:
            zeros = held.zeros.t().contiguous()
        return {
            "qweight": words(packed).t().contiguous(), "qzeros": pack_words(zeros - self.less, kind.bits),
            "scales": held.scales.t().contiguous(), "g_idx": g_idx,
        }  # fmt: skip

    def unpack(self, site: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> tuple[QTensor, Input | None]:
        """See :class:`~lowbit.io.interchange.base.Layout`. A last group of fewer inputs, as AutoGPTQ makes, is read."""
        rows, columns = shape
        kind = self._kind(site, shape, tensors)
        if columns % run_of(kind.bits) or rows % run_of(kind.bits):
            raise CheckpointError(
                f"{rows} by {columns} codes of {kind.bits} bits do not fill words of 32", where=site,
                why="they would be padded, which is not read",
            )  # fmt: skip
        size = columns if kind.group == -1 else kind.group
        groups = -(-columns // size)
        qweight = tensor(site, tensors, "qweight", (columns * kind.bits // 32, rows), (torch.int32,))
        qzeros = tensor(site, tensors, "qzeros", (groups, rows * kind.bits // 32), (torch.int32,))
        found = scales(site, tensors, groups, rows)
        codes = Codes(stream(qweight.t()), columns, 1 << kind.bits)
        zeros = self._zeros(site, kind.bits, unpack_words(qzeros, kind.bits)).t().contiguous()
        middle = bool((zeros == 1 << (kind.bits - 1)).all())
        if self.sym and not self.varies and not middle:
            raise CheckpointError(
                "has other zeros than the middle", where=f"{site}.qzeros",
                why="quantization_config.sym is true: some readers would ignore them, some would not",
            )  # fmt: skip
        held = Grouped(codes, found, None if middle and (self.sym or self.varies) else zeros)
        order = self._grouping(site, tensors, columns, size)
        if order is None:
            return held.affine(shape, kind.group), None
        codes = Codes.of(codes.unpack()[:, order], 1 << kind.bits)
        inner = held._replace(codes=codes).affine(shape, kind.group)
        first = Raw((columns, 2), torch.tensor([[1.0, 0.0]], dtype=torch.float16))
        return Gathered(shape, order.to(torch.int32).view(-1, 1).repeat(1, 2), first, inner), None

    def _kind(self, site: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Kind:
        """What the tensors of a site are: what the configuration says, or where it varies, what their shapes say."""
        if not self.varies:
            return self.kind
        if not {"qweight", "scales"} <= tensors.keys() or {tensors[n].ndim for n in ("qweight", "scales")} != {2}:
            raise CheckpointError("has no qweight and scales of two dimensions", where=site)
        bits, groups = 32 * tensors["qweight"].shape[0] // shape[1], tensors["scales"].shape[0]
        if bits not in BITS or not 1 <= groups <= shape[1]:
            raise CheckpointError(
                f"is of shape {tuple(tensors['qweight'].shape)}, for {shape[1]} inputs", where=f"{site}.qweight"
            )
        if (kind := Kind(bits, self.kind.group)) and groups == -(-shape[1] // (max(kind.group, 0) or shape[1])):
            return kind
        return Kind(bits, -1 if groups == 1 else -(-shape[1] // groups))

    def _zeros(self, site: str, bits: int, stored: UInt8[Tensor, "groups out"]) -> UInt8[Tensor, "groups out"]:
        if self.less and bool((stored == (1 << bits) - 1).any()):
            raise CheckpointError(
                f"stores {(1 << bits) - 1}", where=f"{site}.qzeros",
                why=f"version 1 stores zeros less one: readers make 0 or {1 << bits} of it",
                fix="a gptq_v2 file of the model",
            )  # fmt: skip
        return stored + self.less

    def _grouping(self, site: str, tensors: Mapping[str, Tensor], columns: int, size: int) -> Int[Tensor, "in"] | None:
        """The inputs in the order of their groups, None where that is their own; raises CheckpointError."""
        in_order = torch.arange(columns) // size
        if "g_idx" not in tensors and not self.desc_act:
            return None
        where = f"{site}.g_idx"
        g_idx = tensor(site, tensors, "g_idx", (columns,), (torch.int32, torch.int64)).long()
        if torch.equal(g_idx, in_order):
            return None
        if not self.desc_act:
            raise CheckpointError(
                "is not in order", where=where, why="quantization_config.desc_act is false: some readers ignore it"
            )
        order = g_idx.argsort(stable=True)
        if not torch.equal(g_idx[order], in_order):  # negative, too large, or too many in one group
            raise CheckpointError(
                f"does not put {size} inputs into each of {int(in_order[-1]) + 1} groups", where=where
            )
        return order


@dataclass(frozen=True)
class GptqV2(Gptq):
    """Version 2, which GPTQModel (0.9 on) and newer vLLM know: any zero."""

    name: ClassVar[str] = "gptq-v2"
    checkpoint_format: ClassVar[str] = "gptq_v2"
    less: ClassVar[int] = 0


def _inner(spec: Spec) -> Spec:
    inner = spec.child("inner")
    return spec if inner is None else inner


def _order(site: str, q: Gathered) -> Int[Tensor, "in"]:
    """The input that each column of the inner matrix meets; raises ExportError when that is no mere reordering."""
    order, scale = q.index[:, 0].long(), q.scale.decode()
    if not bool((scale == torch.tensor([1.0, 0.0])).all()) or not torch.equal(
        order.sort().values, torch.arange(len(order))
    ):
        raise ExportError("it picks and adds inputs, the layout can only reorder them", where=site, fix="--to bf16")
    return order


def _put_back(codes: UInt8[Tensor, "out in"], order: Int[Tensor, "in"]) -> UInt8[Tensor, "out in"]:
    out = torch.empty_like(codes)
    out[:, order] = codes
    return out


def _modules(kinds: Mapping[str, Kind], dense: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the low-bit sites below a block, unless some block has one of them in 16 bit."""
    names = dict.fromkeys(_BLOCK.split(site, maxsplit=1)[1] for site in kinds if _BLOCK.search(site))
    kept = {_BLOCK.split(site, maxsplit=1)[1] for site in dense}
    return () if kept & names.keys() else tuple(names)


def _pattern(sites: tuple[str, ...]) -> str:
    """A regular expression for exactly these sites, and for what engines call those that they fuse."""
    fused = [name for name, members in fused_groups(sites).items()]
    return f"^(?:{'|'.join(re.escape(name) for name in (*sites, *fused))})$"
