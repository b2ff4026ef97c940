"""The same model with its residual stream in another orthogonal basis, so that no channel of it is an outlier.

With x' = x R in place of x everywhere in the stream, what reads the stream must undo R and what writes to it apply R:

    W_in' = W_in diag(gain) R      gain of the norm in between, which becomes one; its bias becomes (bias / gain) R
    W_out' = Rᵀ W_out,  b_out' = b_out R,  embeddings' = embeddings R

(SliceGPT, arXiv 2401.15024, theorem 1; QuaRot, arXiv 2404.00456, stage 1a.) A norm without gain and bias commutes with
R: an RMS norm with any orthogonal R, a layer norm with one that keeps the mean, R·1 = 1. So a layer norm stays one,
where those papers first turn it into an RMS norm.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowbit import digest
from lowbit.arrays import Float, Tensor
from lowbit.errors import WeightError
from lowbit.formats.hadamard import hadamard, largest_size
from lowbit.models.graph import stored
from lowbit.models.residual import Roles, close, embedding, head, roles, structures, tokens, unrotatable
from lowbit.models.source import Source
from lowbit.models.stream import Stream


@dataclass(frozen=True, eq=False)
class Basis:
    """An orthogonal R (d, d) made of random signs D and U = C ⊗ H: ``D U``, or ``U D Uᵀ``, for which R·1 = 1.

    H is the Hadamard matrix of the largest power of two in d, C the cosine transform (DCT-II) of the odd rest. Both
    have equal entries in their first column, so U's first column is the direction of the mean; its sign is kept.
    """

    signs: Float[Tensor, "d"]
    keeps_mean: bool

    @classmethod
    def random(cls, d: int, seed: int, keeps_mean: bool) -> Basis:
        """The same for a seed on every machine."""
        signs = torch.randint(0, 2, (d,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0
        if keeps_mean:
            signs[0] = 1.0
        return cls(signs, keeps_mean)

    def apply(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """``x R`` in float32. Cost O(log h + c) a value, h and c being the sizes of H and C."""
        x, signs = x.to(torch.float32), self.signs.to(x.device)
        return _mixed(_mixed(x) * signs, inverse=True) if self.keeps_mean else _mixed(x * signs)


def _mixed(x: Float[Tensor, "*batch d"], inverse: bool = False) -> Float[Tensor, "*batch d"]:
    """``x U``, or ``x Uᵀ``; H is its own inverse."""
    size = largest_size(x.shape[-1])
    C = _cosines(x.shape[-1] // size).to(x.device)
    blocks = hadamard(x, size).unflatten(-1, (len(C), size))
    mixed = torch.einsum("...ch,ce->...eh", blocks, C.t() if inverse else C)
    return mixed.reshape(x.shape)


def _cosines(m: int) -> Float[Tensor, "m m"]:
    """The orthonormal DCT-II, one frequency a column."""
    i = torch.arange(m, dtype=torch.float64)
    C = torch.cos(torch.pi * (2 * i[:, None] + 1) * i / (2 * m)) * math.sqrt(2 / m)
    C[:, 0] = 1 / math.sqrt(m)
    return C.to(torch.float32)


def rotated(source: Source, seed: int = 0) -> Source:
    """``source`` with a randomly rotated residual stream. Its weights are rotated, in float32, as they are read.

    Logits stay the same up to float32 rounding, which is tried on random tokens. A head that was the embedding becomes
    a matrix of its own, and is counted. Cost: one block of each structure runs about four times a linear on a few
    tokens; afterwards O(log d) a value read. Raises ModelError, naming what is in the way, for a model whose stream
    cannot be rotated (a norm whose output is added to it: the embedding's in BLOOM, Gemma 2's after every linear).
    """
    stream = Stream(source, torch.float32)
    found = roles(source, stream)
    width = int(source.skeleton.get_submodule(embedding(source)).embedding_dim)  # type: ignore[arg-type]
    basis = Basis.random(width, seed, any(norm.centres for norm in found.norms.values()))
    config = copy.deepcopy(source.config)
    for part in (config, config.get_text_config(decoder=True)):
        part.tie_word_embeddings = False
    result = Source(source.name, config, _Store(source, found, basis, seed), source.root)
    _prove(source, result, basis, stream)
    return result


class _Store:
    """The weights of a source in another basis, by the names of the model with a head of its own."""

    def __init__(self, source: Source, roles: Roles, basis: Basis, seed: int) -> None:
        self._source, self._roles, self._basis, self._seed = source, roles, basis, seed
        self._shapes = {
            name: tuple(tensor.shape)
            for name, tensor in stored(source.skeleton)
            if isinstance(tensor, nn.Parameter) or source.has(name)
        }
        self._tied: dict[str, str] = {}
        if source.tied:
            self._tied = {f"{head(source)}.weight": f"{embedding(source)}.weight"}
            self._shapes |= {name: self._shapes[other] for name, other in self._tied.items()}

    def names(self) -> Iterable[str]:
        return self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def nbytes(self) -> int:
        """Of the source, and of the head where it had none of its own."""
        return self._source.store.nbytes() + sum(self._held(name).nbytes for name in self._tied)

    def digest(self) -> str:
        return digest.of_value(["rotated", self._seed, self._basis.keeps_mean, self._source.digest])

    def get(self, name: str, index: int | None = None) -> Tensor:
        """A tensor in the new basis, or only its slice ``index``. Raises WeightError when it is missing."""
        if name not in self._shapes:
            raise WeightError(f"the weight {name!r} is missing", where=self._source.name)
        tensor = self._rotated(name)
        return tensor if index is None else tensor[index]

    def _rotated(self, name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        roles, turn, held = self._roles, self._basis.apply, self._held(name)
        if module in roles.norms:
            if leaf == "bias":
                return turn(held / self._gain(module))
            return torch.full(held.shape, 1.0 - roles.norms[module].offset)
        if leaf == "bias":
            return turn(held) if module in roles.writers else held
        if module not in roles.readers and module not in roles.writers:
            return held
        owner = self._source.skeleton.get_submodule(module)
        inputs_first = isinstance(owner, Conv1D | nn.Embedding)  # an embedding is a linear of one-hot tokens
        W = (held.t() if inputs_first else held).to(torch.float32)
        if module in roles.readers:
            W = turn(W * self._gain(roles.readers[module]))
        if module in roles.writers:
            W = turn(W.t()).t()
        return (W.t() if inputs_first else W).contiguous()

    def _gain(self, norm: str) -> Float[Tensor, "d"]:
        """A norm's gain. Raises ModelError where it is zero beside a bias, which could not be divided by it."""
        gain = self._held(f"{norm}.weight").to(torch.float32) + self._roles.norms[norm].offset
        bias = f"{norm}.bias"
        if bias in self._shapes and bool(((gain == 0) & (self._held(bias) != 0)).any()):
            raise unrotatable(norm, "has a channel with a gain of zero and a bias")
        return gain

    def _held(self, name: str) -> Tensor:
        return self._source.tensor(self._tied.get(name, name), self._shapes[name])


def _prove(source: Source, result: Source, basis: Basis, stream: Stream) -> None:
    """Raises ModelError unless both models agree on random tokens, through one block of each structure to logits."""
    other = Stream(result, torch.float32)
    first = {structure: i for i, structure in reversed(list(enumerate(structures(source).values())))}
    weight = f"{head(source)}.weight"
    shape = result.store.shape(weight)
    W = source.tensor(f"{embedding(source)}.weight" if source.tied else weight, shape).to(torch.float32)
    with torch.no_grad():
        x, y = stream.embed(tokens(source)), other.embed(tokens(source))
        _check(embedding(source), basis.apply(x), y)
        for i in sorted(first.values()):
            x, y = stream.run(i, stream.load(i), x), other.run(i, other.load(i), y)
            _check(source.blocks[i], basis.apply(x), y)
        _check(head(source), stream.finish(x) @ W.t(), other.finish(y) @ result.tensor(weight, shape).t())


def _check(where: str, expected: Tensor, found: Tensor) -> None:
    if not close(found, expected):
        off = float((found - expected).abs().max() / expected.abs().max())
        raise unrotatable(where, f"computes something else when rotated (off by {off:.1g} of the largest magnitude)")
