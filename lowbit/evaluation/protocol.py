"""Protocols: which tokens of a text are scored, with how much context. A perplexity without one means nothing.

windows-1024         non-overlapping windows of 1024; every token but a window's first is scored
llamacpp-512         non-overlapping windows; only the second half is scored, as llama.cpp does
sliding-1024-512     windows of 1024 advanced by 512; only tokens not scored before are, the first window whole
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
    """How windows are cut; ``str`` is its one spelling."""

    kind: str
    length: int
    stride: int

    def __str__(self) -> str:
        return f"sliding-{self.length}-{self.stride}" if self.kind == "sliding" else f"{self.kind}-{self.length}"

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
        return Windows(cut, torch.tensor(first), str(self), text, text_digest)

    def _first(self, i: int) -> int:
        if self.kind == "llamacpp":
            return self.length // 2 + 1
        return max(self.length - self.stride, 1) if self.kind == "sliding" and i else 1


def parse(text: str) -> Protocol:
    """A protocol from its spelling; raises RecipeError."""
    if match := re.fullmatch(r"(windows|llamacpp)-(\d+)", text):
        length = int(match[2])
        if length >= 4:
            return Protocol(match[1], length, length)
    if match := re.fullmatch(r"sliding-(\d+)-(\d+)", text):
        length, stride = int(match[1]), int(match[2])
        if length >= 4 and 0 < stride <= length:
            return Protocol("sliding", length, stride)
    raise RecipeError(f"unknown protocol {text!r}", fix="windows-1024, llamacpp-512 or sliding-1024-512")
