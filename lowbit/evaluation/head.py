"""The head: from a model's final hidden states to logits, projected only where they are wanted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import DynamicCache, PreTrainedModel

from lowbit.arrays import Float, Int, Tensor
from lowbit.errors import ModelError
from lowbit.formats.heads import CacheFormat
from lowbit.models.source import Source
from lowbit.models.stream import Stream
from lowbit.runtime.kvcache import KVCache

_SAMPLE = 8  # positions on which a head is checked


@dataclass(frozen=True)
class Head:
    """``logits = cap(scale * (weight @ h + bias))``; the cap is Gemma 2's soft one, the scale Cohere's or Granite's."""

    weight: Float[Tensor, "vocab d"]
    bias: Float[Tensor, "vocab"] | None
    cap: float | None
    scale: float = 1.0

    def __call__(self, hidden: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens vocab"]:
        """Logits in float32; the product runs in the dtype of ``hidden``."""
        logits = linear(hidden, self.weight, self.bias).to(torch.float32)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def beside(self, other: Head) -> Head:
        """The same head on the other's device; where both have the same weights, in the same memory."""
        weight = self.weight.to(other.weight.device)
        if weight.dtype == other.weight.dtype and torch.equal(weight, other.weight):
            weight = other.weight
        return replace(self, weight=weight, bias=None if self.bias is None else self.bias.to(weight.device))

    @classmethod
    def unchecked(cls, model: PreTrainedModel) -> Head:
        """The head as the configuration says."""
        out = model.get_output_embeddings()
        return cls(out.weight.detach(), out.bias, *_cap_and_scale(model.config))

    @classmethod
    def of_source(cls, source: Source, dtype: torch.dtype) -> Head:
        """The head of a model that is not in memory."""
        out = source.skeleton.get_output_embeddings()
        names = {id(p): name for name, p in source.skeleton.named_parameters()}
        weight = source.tensor(names[id(out.weight)], tuple(out.weight.shape)).to(dtype)
        bias = None if out.bias is None else source.tensor(names[id(out.bias)], tuple(out.bias.shape)).to(dtype)
        return cls(weight, bias, *_cap_and_scale(source.config))

    @classmethod
    def of(cls, model: PreTrainedModel, sample: Int[Tensor, "batch length"]) -> Head:
        """The head of a model, checked against the model's own logits on ``sample``.

        Raises ModelError for a model whose logits are not made this way.
        """
        head, sample = cls.unchecked(model), sample.to(model.device)
        with torch.inference_mode():
            own = model(input_ids=sample, use_cache=False).logits.to(torch.float32)
            ours = head(final_hidden(model, sample).flatten(0, 1)).view(own.shape)
        _require_linear(own, ours, type(model).__name__)
        return head

    @classmethod
    def of_stream(cls, stream: Stream) -> Head:
        """The head of a model that is run block by block, checked on random outputs of its last block.

        Raises ModelError like ``of``.
        """
        head, source = cls.of_source(stream.source, stream.dtype), stream.source
        width = source.config.get_text_config(decoder=True).hidden_size
        hidden = torch.randn(1, _SAMPLE, width, generator=torch.Generator().manual_seed(0)).to(stream.dtype)
        with torch.inference_mode():
            own = stream.logits(hidden, head.weight, head.bias).to(torch.float32)
            ours = head(stream.finish(hidden).flatten(0, 1)).view(own.shape)
        _require_linear(own, ours, type(source.skeleton).__name__)
        return head


def _require_linear(
    own: Float[Tensor, "batch length vocab"], ours: Float[Tensor, "batch length vocab"], name: str
) -> None:
    if float((own - ours).abs().max()) > 1e-2 * float(own.abs().max().clamp_min(1.0)):
        raise ModelError(
            "its logits are not a linear map of its final hidden states", where=name,
            why="exact KL is computed from stored hidden states", fix="open an issue with the model's name",
        )  # fmt: skip


def _cap_and_scale(config: Any) -> tuple[float | None, float]:
    text = config.get_text_config(decoder=True)
    scale = getattr(text, "logit_scale", None) or 1.0
    return getattr(text, "final_logit_softcapping", None), scale / (getattr(text, "logits_scaling", None) or 1.0)


def final_hidden(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch length"],
    chunk: int | None = None,
    kv: CacheFormat | None = None,
) -> Float[Tensor, "batch length d"]:
    """Hidden states after the final norm, what the head reads.

    In one pass, or through the cache, ``chunk`` tokens at a time (1: token by token, as in decoding), with keys and
    values rounded where ``kv`` says how. Raises ModelError for a model whose cache cannot be rounded.
    """
    if chunk is None:
        whole: Tensor = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return whole
    cache = DynamicCache(config=model.config) if kv is None else KVCache(model.config, kv, mirror=True)
    states = [
        model.base_model(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state
        for part in tokens.split(chunk, dim=1)
    ]
    return torch.cat(states, dim=1)
