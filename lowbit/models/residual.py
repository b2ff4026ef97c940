"""The residual stream: who reads it, through which norm, and who writes to it. Nothing here knows a family by name.

With every linear of a block made to return zeros, the block must return what it was given. A linear that then returns
noise writes to the stream if that noise comes out; a norm reads the stream if it is then given what the block was
given, and its readers are those of an edge (:mod:`lowbit.models.edges`). Outside of the blocks there may be embeddings,
one norm after the blocks, and the head.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from lowbit.arrays import Float, Int, Tensor
from lowbit.errors import ModelError
from lowbit.models import edges
from lowbit.models.graph import Experts, is_linear, outside_blocks
from lowbit.models.source import Source
from lowbit.models.stream import Stream

TOLERANCE = 1e-4  # of the largest magnitude: how closely two ways to compute the same must agree


class Norm(NamedTuple):
    """What a norm adds to its stored gain (Gemma: 1), and whether it removes the mean (a layer norm)."""

    offset: float
    centres: bool


@dataclass(frozen=True)
class Roles:
    """Who has to do with the residual stream, by names of modules."""

    readers: Mapping[str, str]
    """linears and routers, with the norm through which each reads the stream"""
    norms: Mapping[str, Norm]
    writers: frozenset[str]
    """linears, and embeddings of tokens and positions"""

    def within(self, prefix: str) -> Roles:
        """The same by names that begin with ``prefix``."""
        return Roles(
            {f"{prefix}.{reader}": f"{prefix}.{norm}" for reader, norm in self.readers.items()},
            {f"{prefix}.{name}": norm for name, norm in self.norms.items()},
            frozenset(f"{prefix}.{writer}" for writer in self.writers),
        )

    def __or__(self, other: Roles) -> Roles:
        return Roles({**self.readers, **other.readers}, {**self.norms, **other.norms}, self.writers | other.writers)


Structure = tuple[tuple[str, tuple[int, ...]], ...]
"""The names and shapes of a block's parameters."""


def structures(source: Source) -> dict[str, Structure]:
    """Of every block; what is true of how one block computes is true of all of its structure."""
    return {
        name: tuple((n, tuple(p.shape)) for n, p in source.skeleton.get_submodule(name).named_parameters())
        for name in source.blocks
    }


def roles(source: Source, stream: Stream) -> Roles:
    """The roles of all modules. Cost: one block of each structure runs about four times a linear, on a few tokens.

    Raises ModelError, naming the module, for a path into or out of the stream that is of no known kind.
    """
    known: dict[Structure, Roles] = {}
    with torch.no_grad():
        x = torch.randn(stream.embed(tokens(source)).shape, generator=torch.Generator().manual_seed(0))
        found = _outside(source, stream, x)
        for i, (name, structure) in enumerate(structures(source).items()):
            if structure not in known:
                known[structure] = _in_block(stream, i, x)
            found |= known[structure].within(name)
    return found


def head(source: Source) -> str:
    """The name of the linear that makes logits; raises ModelError where there is none."""
    module = source.skeleton.get_output_embeddings()
    if module is None:
        raise unrotatable(source.name, "has no head")
    return _name_of(source.skeleton, module)


def embedding(source: Source) -> str:
    """The name of the embedding of tokens."""
    return _name_of(source.skeleton, source.skeleton.get_input_embeddings())


def tokens(source: Source) -> Int[Tensor, "1 length"]:
    """A few random tokens to try a model on."""
    vocab = source.config.get_text_config(decoder=True).vocab_size
    return torch.randint(0, vocab, (1, 16), generator=torch.Generator().manual_seed(0))


def close(a: Tensor, b: Tensor) -> bool:
    """Whether a is b up to rounding."""
    return bool(((a - b).abs().max() <= TOLERANCE * b.abs().max()).item())


def unrotatable(where: str, what: str) -> ModelError:
    return ModelError(
        f"{what}, so the residual stream cannot be rotated", where=where,
        why="only linears, and norms right before them, may meet the stream, or another basis changes the function",
        fix="rotate without fused=true, which changes the basis at every linear; or, if this path is linear all the "
            "same, a rule for it in lowbit/models/residual.py",
    )  # fmt: skip


def _outside(source: Source, stream: Stream, x: Float[Tensor, "batch length d"]) -> Roles:
    """Embeddings, the head, and the norm between the last block and it."""
    skeleton = source.skeleton
    held = [name for name, t in outside_blocks(skeleton, source.blocks) if isinstance(t, nn.Parameter)]
    writers: set[str] = set()
    norms: dict[str, Norm] = {}
    final = stream.finish(x)
    for name in dict.fromkeys(name.rpartition(".")[0] for name in held):
        module = skeleton.get_submodule(name)
        if isinstance(module, nn.Embedding) and module.embedding_dim == x.shape[-1]:
            writers.add(name)
        elif _is_norm(module, x.shape[-1]) and close((norm := source.load(name, torch.float32))(x), final):
            norms[name] = _probed(norm, x)
        elif name != head(source):
            raise unrotatable(name, "is neither an embedding, nor the head, nor the norm before it")
    if not norms:
        raise unrotatable(source.name, "has no norm with a gain before its head")
    return Roles({head(source): next(iter(norms))}, norms, frozenset(writers))


def _in_block(stream: Stream, i: int, x: Float[Tensor, "batch length d"]) -> Roles:
    """The roles in one block, by names relative to it."""
    block, name = stream.load(i), stream.source.blocks[i]
    silent = _SilentBlock(stream, i, block, x)
    writers = {w for speaker in silent.speakers if silent.is_added(speaker) for w in silent.last_linears(speaker)}
    found = {e.producer: e for e in edges.find(block, lambda: stream.run(i, block, x)) if e.norm}
    for norm in silent.reading:
        if norm not in found:
            raise unrotatable(f"{name}.{norm}", "reads the stream, and more than linears read its output")
    if not silent.reading or not writers:
        what = f"has {len(silent.reading)} norms that read the stream and {len(writers)} linears that write to it"
        raise unrotatable(name, what)
    readers = {reader: norm for norm in silent.reading for reader in found[norm].consumers}
    norms = {norm: _probed(block.get_submodule(norm), x) for norm in silent.reading}
    return Roles(readers, norms, frozenset(writers))


class _SilentBlock:
    """A block whose linears (and mixtures of experts, each as a whole) return zeros; ``reading``: its first norms."""

    def __init__(self, stream: Stream, i: int, block: nn.Module, x: Float[Tensor, "batch length d"]) -> None:
        self.name, self.block, self.x = stream.source.blocks[i], block, x
        self._run = functools.partial(stream.run, i, block, x)
        modules = dict(block.named_modules())
        mixtures = tuple(f"{n}." for n, m in modules.items() if isinstance(m, Experts))
        whole = {n: m for n, m in modules.items() if not n.startswith(mixtures)}
        self.speakers = [n for n, m in whole.items() if is_linear(m) or isinstance(m, Experts)]
        norms = {n: m for n, m in modules.items() if _is_norm(m, x.shape[-1])}
        given: dict[str, Tensor] = {}

        def note(_module: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
            given[name] = args[0]

        handles = [m.register_forward_pre_hook(functools.partial(note, name=n)) for n, m in norms.items()]
        out, _ = self._speak(None)
        for handle in handles:
            handle.remove()
        if not close(out, x):
            raise unrotatable(self.name, "does not add to what it is given (a norm after the sum?)")
        self.reading = [
            n for n in norms if n in given and given[n].numel() == x.numel() and close(given[n].view_as(x), x)
        ]

    def is_added(self, speaker: str) -> bool:
        """Whether what a linear returns is added to the stream, at most times a number.

        Raises ModelError when it changes the stream in another way.
        """
        out, noise = self._speak(speaker)
        shift = (out - self.x).flatten()
        if float(shift.abs().max()) <= TOLERANCE * float(self.x.abs().max()):
            return False
        if shift.shape == noise.shape and close(shift, noise * (shift @ noise) / noise.square().sum()):
            return True
        what = "reaches the stream, but is not simply added to it (a norm after it?)"
        raise unrotatable(f"{self.name}.{speaker}", what)

    def last_linears(self, speaker: str) -> list[str]:
        """The linears that make a speaker's output: itself, or the last of every expert."""
        module = self.block.get_submodule(speaker)
        return [f"{speaker}.{e}.down_proj" for e in range(len(module))] if isinstance(module, Experts) else [speaker]

    def _speak(self, speaker: str | None) -> tuple[Float[Tensor, "batch length d"], Float[Tensor, "n"]]:
        """The block's output while one linear returns noise, of another size for every token, and that noise."""
        said = torch.zeros(1)

        def hook(_module: nn.Module, _args: Any, out: Tensor, name: str) -> Tensor:
            nonlocal said
            if name != speaker:
                return torch.zeros_like(out)
            generator = torch.Generator().manual_seed(1)
            noise = torch.randn(out.shape, generator=generator) * torch.rand(*out.shape[:-1], 1, generator=generator)
            said = noise.flatten()
            return noise

        handles = [
            self.block.get_submodule(name).register_forward_hook(functools.partial(hook, name=name))
            for name in self.speakers
        ]
        try:
            return self._run(), said
        finally:
            for handle in handles:
                handle.remove()


def _probed(norm: nn.Module, x: Float[Tensor, "batch length d"]) -> Norm:
    held = dict(norm.named_parameters())
    zeros = {name: torch.zeros_like(p) for name, p in held.items()}
    bare = torch.func.functional_call(norm, zeros, (x,))
    unit = torch.func.functional_call(norm, {**zeros, "weight": torch.ones_like(held["weight"])}, (x,)) - bare
    offset = float((bare * unit).sum() / unit.square().sum())
    return Norm(round(offset, 4), close(norm(x + 1), norm(x)))


def _is_norm(module: nn.Module, d: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and tuple(weight.shape) == (d,)


def _name_of(model: nn.Module, module: nn.Module) -> str:
    found: str = next(name for name, m in model.named_modules() if m is module)
    return found
