"""Products with entropy-coded matrices, without decoding them to memory.

    coded = Product(blob)
    coded.multiply(x)      # x Nᵀ in whole numbers, exactly; |x| <= 32512
    coded.linear(...)      # gain * (x[order] * step) Nᵀ, with x rounded to 16 bits a token

64 symbols are decoded into a vector register and multiplied from there: what is read from memory is the stream, once.
A factor of 16 bits is two signed bytes, ``255 * high + low``: two multiply-adds of 64 symbols, little
beside decoding them. Sums of whole numbers depend neither on the processor nor on the threads.

:func:`multiply` and :func:`linear` are the same in plain torch, by decoding.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int8, Int16, Int32, Int64

from lowbit import _native
from lowbit.arrays import Float, Tensor
from lowbit.codec import stream as coder
from lowbit.codec.stream import Blob
from lowbit.errors import FormatError

LARGEST = 255 * 127 + 127
"""The largest factor. Rounding a token to such errs by at most 1/65024 of its largest input."""


class Product:
    """A coded matrix N, ready to be multiplied. Keeps the blob's memory, and 12 bytes for each of its exceptions.

    Raises FormatError for bytes that are no stream; segments are checked as they are read. ``fits`` tells whether
    N can be multiplied as it is read: no table with more than seven raw bits, no panel wider than 2^17 columns.
    ``narrow``: whether its numbers are bytes, and so few a row that sums of their products with bytes fit 32 bits.
    """

    def __init__(self, stream: Blob) -> None:
        self.stream: Blob = stream.detach().cpu().contiguous()
        self._native: Any = _checked(_native.Product, self.stream.numpy())
        self.shape: tuple[int, int] = self._native.shape
        self.fits: bool = self._native.fits
        least, largest = _checked(_native.code_range, self.stream.numpy())
        self.narrow: bool = least >= -128 and largest <= 127 and self.shape[1] <= 1 << 17

    def multiply(self, x: Int16[Tensor, "tokens columns"]) -> Int64[Tensor, "tokens rows"]:
        """``x Nᵀ``; raises FormatError for factors beyond 32512, another width or a corrupt stream."""
        out = torch.empty(len(x), self.shape[0], dtype=torch.int64)
        threads = torch.get_num_threads()
        _checked(self._native.multiply, x.contiguous().numpy(), out.numpy(), threads)
        return out

    def linear(
        self,
        x: Float[Tensor, "tokens columns"],
        order: Int32[Tensor, "columns"],
        step: Float[Tensor, "columns"],
        gain: Float[Tensor, "rows"],
    ) -> Float[Tensor, "tokens rows"]:
        """``gain * (x[order] * step) Nᵀ`` in float32, each token's entered inputs rounded to 16 bits.

        ``step`` is in the order of N's columns. A token that is not finite gives NaN. Raises as :meth:`multiply`.
        """
        out = torch.empty(len(x), self.shape[0])
        arrays = (x.contiguous().numpy(), order.numpy(), step.numpy(), gain.numpy(), out.numpy())
        _checked(self._native.linear, *arrays, torch.get_num_threads())
        return out


def multiply(stream: Blob, x: Int16[Tensor, "tokens columns"]) -> Int64[Tensor, "tokens rows"]:
    """:meth:`Product.multiply` by decoding; exact in float64, since no sum reaches 2^53."""
    return (x.double() @ coder.decode(stream).double().T).to(torch.int64)


def linear(
    stream: Blob,
    x: Float[Tensor, "tokens columns"],
    order: Int32[Tensor, "columns"],
    step: Float[Tensor, "columns"],
    gain: Float[Tensor, "rows"],
) -> Float[Tensor, "tokens rows"]:
    """:meth:`Product.linear` by decoding, the same to the last bit."""
    rounded, scale = rounding(x[:, order.long()] * step)
    y = multiply(stream, rounded).double() * (scale * gain.double())
    return y.to(torch.float32)


def rounding(x: Float[Tensor, "tokens columns"]) -> tuple[Int16[Tensor, "tokens columns"], Float[Tensor, "tokens 1"]]:
    """Whole numbers up to ``LARGEST`` and a scale (float64) a token with ``x ≈ scale * numbers``, ties to even.

    A token that is not finite has numbers 0 and the scale NaN.
    """
    largest = x.abs().amax(1, keepdim=True)
    finite = largest <= 3.4e38
    scale = largest.double().clamp_min(1e-30) / LARGEST
    numbers = torch.where(finite, torch.round(x * (1 / scale).to(torch.float32)), 0.0)
    return numbers.to(torch.int16), torch.where(finite, scale, torch.nan)


def planes(numbers: Int16[Tensor, "tokens columns"]) -> Int8[Tensor, "2*tokens columns"]:
    """The high bytes of all tokens, then the low ones: ``numbers = 255 * high + low``, both in [-127, 127]."""
    wide = numbers.to(torch.int32)
    high = torch.div(wide + 127, 255, rounding_mode="floor")
    return torch.cat([high, wide - 255 * high]).to(torch.int8)


def _checked(native: Any, *arguments: Any) -> Any:
    """A native call; what it finds wrong becomes a FormatError."""
    try:
        return native(*arguments)
    except ValueError as error:
        raise FormatError(
            f"this stream cannot be multiplied: {error}",
            why="Nothing of the product was kept.",
            fix="read the file again; if its digest differs, it was altered",
        ) from error
