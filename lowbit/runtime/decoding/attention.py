"""Rotary attention of one token a row in two calls, one before and one after the cache takes keys and values."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from lowbit import _native
from lowbit.arrays import Bool, Float, Tensor
from lowbit.runtime.decoding.products import Products, products
from lowbit.runtime.decoding.swap import Swapped, agree, plain, readable, sample
from lowbit.runtime.kernels.packed import FEW_TOKENS

_INPUTS, _OUTPUT = ("q_proj", "k_proj", "v_proj"), ("o_proj",)
_GIVEN = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")
_WITHOUT_MEANING = ("position_ids", "use_cache")  # here
_LANES = 16  # numbers that native code reads at once

Angles = tuple[Float[Tensor, "any one turned"], Float[Tensor, "any one turned"]]
Heads = Float[Tensor, "rows _heads one size"]
Seen = Float[Tensor, "rows heads width size"]
Mask = Bool[Tensor, "rows one one width"]


class Attention(Swapped):
    """``o(softmax(turned(q) turned(k)ᵀ * scaling) v)`` over the cache, whichever it is.

    Queries and keys are turned as the plain code turns them, to the bit; scores and sums are float32.
    """

    kept: ClassVar[tuple[str, ...]] = ("same", "_products")
    fleeting: ClassVar[tuple[str, ...]] = ("_products",)
    config: Any
    head_dim: int
    layer_idx: int
    scaling: float

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        known = inspect.signature(module.forward).parameters.values()
        wanted = {p.name for p in known if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        size, number, scaling = (getattr(module, name, None) for name in ("head_dim", "layer_idx", "scaling"))
        return (
            {name for name, _ in module.named_children()} == {*_INPUTS, *_OUTPUT}
            and not list(module.parameters(recurse=False))
            and getattr(getattr(module, "config", None), "clip_qkv", None) is None  # no trial is sure to reach it
            and wanted <= set(_GIVEN) <= {p.name for p in known}
            and isinstance(size, int) and size % _LANES == 0
            and isinstance(number, int) and isinstance(scaling, float)
        )  # fmt: skip

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self._found(**kwargs) if not args and self._takes(**kwargs) else None
        return super().forward(*args, **kwargs) if found is None else (found, None)

    def _takes(
        self, hidden_states: Any = None, position_embeddings: Any = None, attention_mask: Any = None,
        past_key_values: Any = None, **others: Any,
    ) -> bool:  # fmt: skip
        x, mask = hidden_states, attention_mask
        return (
            isinstance(x, Tensor) and plain(x) and x.ndim == 3 and x.shape[1] == 1 and 0 < x.shape[0] <= FEW_TOKENS
            and past_key_values is not None
            and self.config._attn_implementation == "sdpa"  # others have other masks
            and (mask is None or (mask.dtype is torch.bool and mask.shape[:3] == (x.shape[0], 1, 1)))
            and isinstance(position_embeddings, tuple) and _angles(position_embeddings, x.shape[0])
            and all(v is None or v is False for name, v in others.items() if name not in _WITHOUT_MEANING)
        )  # fmt: skip

    def _found(
        self, hidden_states: Any, position_embeddings: Any, past_key_values: Any, attention_mask: Any = None, **_: Any
    ) -> Float[Tensor, "rows 1 d"] | None:
        qkv, out = products(self, _INPUTS, hidden_states), products(self, _OUTPUT, hidden_states)
        if qkv is None or out is None:
            return None
        if self.same is None:
            self.same = self._try(qkv, out, hidden_states.shape[-1], position_embeddings[0].shape[-1])
        if not self.same:
            return None
        return self._step(qkv, out, hidden_states, position_embeddings, attention_mask, past_key_values)

    def _try(self, qkv: Products, out: Products, width: int, turned: int) -> bool:
        """Three tokens at once, as the module reads them, and one by one."""
        x, angles = sample(1, 3, width), sample(1, 3, turned)
        cos, sin = angles.cos(), angles.sin()
        own = super().forward(
            hidden_states=x, position_embeddings=(cos, sin), attention_mask=None, past_key_values=None
        )
        if not (isinstance(own, tuple) and len(own) == 2):
            return False
        cache = DynamicCache()
        tokens = [slice(i, i + 1) for i in range(3)]
        found = [self._step(qkv, out, x[:, i], (cos[:, i], sin[:, i]), None, cache) for i in tokens]
        return agree(own[0], torch.cat(found, dim=1))

    def _step(
        self,
        qkv: Products,
        out: Products,
        x: Float[Tensor, "rows 1 d"],
        angles: Angles,
        mask: Mask | None,
        cache: Cache,
    ) -> Float[Tensor, "rows 1 d"]:
        q, k, v = turned(qkv, x, angles, self.head_dim)
        keys, values = cache.update(k, v, self.layer_idx)
        return attended(out, q, keys, values, mask, self.scaling)


def _angles(given: tuple[Any, ...], rows: int) -> bool:
    """Cosines and sines of one position a row, or of one for all."""
    if len(given) != 2 or not all(isinstance(a, Tensor) and readable(a) for a in given):
        return False
    cos, sin = given
    return cos.shape == sin.shape and cos.numel() in (cos.shape[-1], rows * cos.shape[-1])


def turned(
    qkv: Products, x: Float[Tensor, "rows 1 d"], angles: Angles, size: int
) -> tuple[Heads, Heads, Heads]:  # fmt: skip
    """Queries, keys and values of one token a row, the first two turned by the angles of its position."""
    cos, sin = angles
    rows, numbers = x.shape[0], cos.shape[-1]
    if not _angles(angles, rows):
        raise ValueError(f"angles of {tuple(cos.shape)} and {tuple(sin.shape)} for {rows} rows")
    y = torch.empty(rows * sum(qkv.rows))
    _native.turned(
        qkv.natives, qkv.biases, x.data_ptr(), x.numel(), y.data_ptr(), y.numel(), cos.data_ptr(), sin.data_ptr(),
        numbers, cos.numel() == numbers, size, torch.get_num_threads(),
    )  # fmt: skip
    q, k, v = torch.split_with_sizes(y, [rows * n for n in qkv.rows])
    return q.view(rows, -1, 1, size), k.view(rows, -1, 1, size), v.view(rows, -1, 1, size)


def attended(
    out: Products, q: Heads, keys: Seen, values: Seen, mask: Mask | None, scale: float
) -> Float[Tensor, "rows 1 d"]:
    """What one token a row sees, over keys and values of any strides, times the output's weight.

    Cost: two products a number of ``q`` and token that is seen. Neither other rows nor hidden tokens change a result.
    """
    rows, heads, width, size = keys.shape
    if q.shape[0] != rows or values.shape != keys.shape:
        raise ValueError(f"queries of {q.shape[0]} rows, keys {tuple(keys.shape)}, values {tuple(values.shape)}")
    keys, values = _dense(keys), _dense(values)
    if mask is not None and (mask.shape[-1] != width or mask.stride(-1) != 1):
        mask = mask.expand(rows, 1, 1, width).contiguous()
    y = torch.empty(rows, 1, out.rows[0])
    _native.attend(
        q.data_ptr(), (keys.data_ptr(), *keys.stride()[:3]), (values.data_ptr(), *values.stride()[:3]),
        0 if mask is None else mask.data_ptr(), 0 if mask is None else mask.stride(0),
        rows, heads, q.shape[1] // heads, width, size, scale,
        out.natives, out.biases, y.data_ptr(), y.numel(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _dense(seen: Tensor) -> Tensor:
    return seen if seen.stride(-1) == 1 and seen.dtype is torch.float32 else seen.to(torch.float32).contiguous()
