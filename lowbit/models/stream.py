"""Running a model block by block: the embedding, then one block at a time.

The model's own forward decides masks and positions. It is run once for every batch shape with recorders in place
of its blocks; they note the keyword arguments that each block would have been given.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from lowbit.arrays import Float, Int, Tensor
from lowbit.models.source import Source


class Stream:
    """A source made runnable with memory for one block (and the embedding) at a time."""

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.source, self.dtype, self.device = source, dtype, torch.device(device)
        self._arguments: dict[tuple[int, ...], list[_Call]] = {}
        self._form = _Form()
        self._shell: Any = None  # a PreTrainedModel without its blocks
        self._tail: Any = None

    def embed(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length d"]:
        """What the first block reads; also learns what every block is called with at this shape."""
        if self._shell is None:
            self._shell = self._build_shell(embedding=True)
        recorders = [m for m in self._shell.modules() if isinstance(m, _Recorder)]
        if recorders[0].form.returns_tuple is None:
            recorders[0].probe = self.load(0)
        with torch.no_grad():
            self._shell.base_model(input_ids=tokens.to(self.device), use_cache=False)
        self._arguments[tuple(tokens.shape)] = [r.arguments for r in recorders]
        hidden = recorders[0].hidden
        recorders[0].probe = None
        for recorder in recorders:
            recorder.hidden = None
        assert hidden is not None  # every model calls its first block
        return hidden

    def close(self) -> None:
        """Free the embedding; blocks can still be run."""
        self._shell = None

    def load(self, i: int) -> nn.Module:
        """Block ``i`` with its weights."""
        return self.source.load(self.source.blocks[i], self.dtype, self.device).to(self.device)

    def run(self, i: int, block: nn.Module, hidden: Float[Tensor, "batch length d"]) -> Float[Tensor, "batch length d"]:
        """The output of block ``i``; ``hidden`` has a batch shape that was embedded before."""
        with torch.no_grad():
            return self.run_with_gradients(i, block, hidden)

    def run_with_gradients(
        self, i: int, block: nn.Module, hidden: Float[Tensor, "batch length d"]
    ) -> Float[Tensor, "batch length d"]:
        """The same, recorded for autograd."""
        call = self._arguments[tuple(hidden.shape[:2])][i]
        out = block(hidden.to(self.device), *call.args, **call.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def learn(self, shape: tuple[int, int]) -> None:
        """Learn what blocks are called with at another (batch, length); the embedding is loaded for it."""
        if shape not in self._arguments:
            closed = self._shell is None
            self.embed(torch.zeros(shape, dtype=torch.int64))
            if closed:
                self.close()

    def finish(self, hidden: Float[Tensor, "batch length d"]) -> Float[Tensor, "batch length d"]:
        """Final hidden states, what the head reads, from the output of the last block; loads no embedding."""
        with self._ending(hidden) as (model, places):
            states: Tensor = model.base_model(inputs_embeds=places, use_cache=False).last_hidden_state
        return states

    def logits(
        self, hidden: Float[Tensor, "batch length d"], weight: Float[Tensor, "vocab d"],
        bias: Float[Tensor, "vocab"] | None,
    ) -> Float[Tensor, "batch length vocab"]:  # fmt: skip
        """What the model itself makes of the output of its last block, with a head of these weights."""
        with self._ending(hidden) as (model, places):
            out = model.get_output_embeddings()
            out.weight = nn.Parameter(weight, requires_grad=False)
            out.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
            logits: Tensor = model(inputs_embeds=places, use_cache=False).logits
        return logits

    @contextlib.contextmanager
    def _ending(self, hidden: Float[Tensor, "batch length d"]) -> Iterator[tuple[Any, Tensor]]:
        """The model with ``hidden`` as what its last block returns, and embeddings for it that do not matter."""
        if self._tail is None:
            self._tail = self._build_shell(embedding=False)
        last = [m for m in self._tail.modules() if isinstance(m, _Recorder)][-1]
        last.replacement = hidden
        embedding: Any = self.source.skeleton.get_input_embeddings()
        shape = *hidden.shape[:2], embedding.weight.shape[1]
        try:
            with torch.no_grad():
                yield (
                    self._tail,
                    torch.zeros(shape, dtype=self.dtype, device=self.device),
                )
        finally:
            last.replacement = last.hidden = None

    def _build_shell(self, embedding: bool) -> Any:
        """The model with recorders for its blocks and without its head, everything else loaded."""
        skeleton = copy.deepcopy(self.source.skeleton)
        path, _, _ = self.source.blocks[0].rpartition(".")
        parent, _, leaf = path.rpartition(".")
        layers = list(skeleton.get_submodule(path).children())
        recorders = nn.ModuleList([_Recorder(layer, self._form) for layer in layers])
        setattr(skeleton.get_submodule(parent), leaf, recorders)
        if not embedding:
            skeleton.set_input_embeddings(nn.Identity())
        self.source.fill(skeleton.base_model, skeleton.base_model_prefix, self.dtype, self.device).to(self.device)
        return skeleton


class _Call(NamedTuple):
    """What a block is given beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class _Form:
    """Whether blocks of this model return a tuple; known once a real one has been run."""

    returns_tuple: bool | None = None


class _Recorder(nn.Module):
    """Stands for a block: passes its input on, and remembers what it was called with."""

    def __init__(self, block: nn.Module, form: _Form) -> None:
        super().__init__()
        self.form = form
        self._block = [block]  # in a list: not a submodule, only asked for its attributes
        self.probe: nn.Module | None = None
        self.hidden: Tensor | None = None
        self.replacement: Tensor | None = None
        self.arguments = _Call((), {})

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.arguments = hidden, _Call(args, kwargs)
        if self.probe is not None:
            self.form.returns_tuple = isinstance(self.probe(hidden, *args, **kwargs), tuple)
        out = hidden if self.replacement is None else self.replacement
        return (out, None) if self.form.returns_tuple else out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)
