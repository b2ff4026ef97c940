"""What every layout of another ecosystem is: a pure map between the QTensor of one linear and its tensors in a file.

    layout = Gptq.for_model(model)              one set of settings for a whole model; ExportError names what differs
    layout.pack("model.layers.0.mlp.up_proj", q)  -> {"qweight": ..., "qzeros": ..., "scales": ..., "g_idx": ...}
    layout.config()                             -> quantization_config of config.json

    layout = Gptq.of_config(config)             the settings of somebody else's files
    layout.unpack(site, shape, tensors)         -> QTensor: the same codes, nothing rounded

A layout holds a QTensor or refuses it by name; it never rounds. Directories, shards, tokenizers and tied heads are the
exporter's and importer's work, the same for all layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from lowbit.arrays import Tensor
from lowbit.formats.activation import ActivationFormat, Input
from lowbit.formats.heads import CacheFormat
from lowbit.formats.qtensor import QTensor
from lowbit.formats.spec import Spec


@dataclass(frozen=True)
class LowBitModel:
    """What is to be exported, without its data: which linear is in which format, and which stay in 16 bit."""

    architecture: str
    """``LlamaForCausalLM``"""
    specs: Mapping[str, Spec]
    """By site: the module's name in the files, without ``.weight``: experts are named one by one
    (``...experts.3.w1``), and gate and up projections that the model fuses are sites of their own."""
    dense: tuple[str, ...] = ()
    """Sites of linears that stay in 16 bit, such as ``lm_head``."""
    inputs: Mapping[str, ActivationFormat] = field(default_factory=dict)
    """How the inputs of a site are rounded."""
    kv: CacheFormat | None = None


@dataclass(frozen=True)
class Refusal:
    """Why a layout cannot hold a linear bit for bit, and the nearest that can."""

    why: str
    fix: str = ""


@runtime_checkable
class Layout(Protocol):
    """One ecosystem's layout with the settings of one model."""

    name: ClassVar[str]
    """As the command line spells it: ``gptq``, ``gptq-v2``, ``awq``, ``compressed-tensors``, ``bnb``."""
    suffixes: ClassVar[frozenset[str]]
    """Every tensor that a linear may own in a file, as ``SITE.suffix``."""

    @classmethod
    def refusal(cls, spec: Spec, input: ActivationFormat | None = None) -> Refusal | None:
        """None when one linear of this spec can be held exactly. Pure; looks at nothing but its arguments."""
        ...

    @classmethod
    def for_model(cls, model: LowBitModel) -> Layout:
        """Settings for a model; raises ExportError naming the first site that is refused or differs from the rest."""
        ...

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Layout:
        """Settings from the untrusted ``quantization_config`` of a file; raises CheckpointError naming the field."""
        ...

    def config(self) -> dict[str, Any]:
        """``quantization_config``, with every field that the ecosystem's loaders require."""
        ...

    def files(self) -> dict[str, Any]:
        """Other JSON files that the ecosystem expects beside config.json, by name."""
        ...

    def notes(self) -> tuple[str, ...]:
        """What the files cannot say of the model, a sentence each (a KV format, ...): users are warned with them."""
        ...

    def pack(self, site: str, q: QTensor, input: Input | None = None) -> dict[str, Tensor]:
        """The tensors of a linear by suffix. Decoding them as the ecosystem does gives ``q.decode()`` bit for bit."""
        ...

    def unpack(self, site: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> tuple[QTensor, Input | None]:
        """The inverse of ``pack`` for tensors from an untrusted file: shapes, dtypes and ranges are checked first.

        ``shape`` is (out, in), from the model's skeleton. Raises CheckpointError naming the tensor.
        """
        ...


if TYPE_CHECKING:
    LayoutClass = type[Layout]
else:
    LayoutClass = type  # of a protocol with data, only instances can be checked while a program runs
