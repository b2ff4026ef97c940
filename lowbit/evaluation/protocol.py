"""Protocols: which tokens of a text are scored, with how much context. A perplexity without one means nothing.

windows-1024         non-overlapping windows of 1024; every token but a window's first is scored
llamacpp-512         non-overlapping windows; only the second half is scored, as llama.cpp does
sliding-1024-512     windows of 1024 advanced by 512; only tokens not scored before are, the first window whole
.../chunk-64         run through the cache, 64 tokens at a time, as a rounded cache must be; chunk-1 as in decoding
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from lowbit import digest
from lowbit.arrays import Int, Tensor
from lowbit.errors import CalibrationError, RecipeError


@dataclass(frozen=True)
class Windows:
    """Token windows and, for each, the first position whose token is scored; the rest of the window follows."""

    ids: Int[Tensor, "windows length"]
    first: Int[Tensor, "windows"]
    protocol: str
    text: str
    text_digest: str

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return int((self.ids.shape[1] - self.first).sum())

    @property
    def digest(self) -> str:
        """Identity of exactly these tokens, scored exactly so."""
        return digest.of_value([digest.of_tensor(self.ids), digest.of_tensor(self.first)])


@dataclass(frozen=True)
class Protocol:
    """How windows are cut, and run (in one pass, or in chunks); ``str`` is its one spelling."""

    kind: str
    length: int
    stride: int
    chunk: int | None = None

    @property
    def cutting(self) -> str:
        """The spelling of the windows alone."""
        return f"sliding-{self.length}-{self.stride}" if self.kind == "sliding" else f"{self.kind}-{self.length}"

    def __str__(self) -> str:
        return in_chunks(self.cutting, self.chunk)

    def cut(self, ids: Int[Tensor, "tokens"], limit: int | None, text: str, text_digest: str) -> Windows:
        """The windows of a tokenized text, at most ``limit``; a last partial window is left out.

        Raises CalibrationError when there are fewer than ``limit``, or none.
        """
        starts = list(range(0, ids.numel() - self.length + 1, self.stride))
        if len(starts) < (limit or 1):
            raise CalibrationError(
                f"{ids.numel()} tokens give {len(starts)} windows of {self}, {limit or 1} are asked for", where=text,
                fix=f"a longer text, shorter windows, or --windows {max(len(starts), 1)}",
            )  # fmt: skip
        starts = starts[:limit]
        first = [self._first(i) for i in range(len(starts))]
        cut = torch.stack([ids[s : s + self.length] for s in starts])
        return Windows(cut, torch.tensor(first), self.cutting, text, text_digest)

    def _first(self, i: int) -> int:
        if self.kind == "llamacpp":
            return self.length // 2 + 1
        return max(self.length - self.stride, 1) if self.kind == "sliding" and i else 1


def parse(text: str) -> Protocol:
    """A protocol from its spelling; raises RecipeError."""
    if match := re.fullmatch(r"(?:(windows|llamacpp)-(\d+)|sliding-(\d+)-(\d+))(?:/chunk-([1-9]\d*))?", text):
        chunk = int(match[5]) if match[5] else None
        length = int(match[2] or match[3])
        stride = int(match[4]) if match[4] else length
        if length >= 4 and 0 < stride <= length:
            return Protocol(match[1] or "sliding", length, stride, chunk)
    raise RecipeError(
        f"unknown protocol {text!r}", fix="windows-1024, llamacpp-512, sliding-1024-512, or windows-1024/chunk-64"
    )


def in_chunks(protocol: str, chunk: int | None) -> str:
    """The spelling of a protocol whose windows are run in chunks."""
    return protocol if chunk is None else f"{protocol}/chunk-{chunk}"
