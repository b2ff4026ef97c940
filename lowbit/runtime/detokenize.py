"""Text from tokens as they come: no half characters, no half stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BEFORE = 16  # tokens of a prompt: a tokenizer needs some to tell the space of the next word
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 32  # tokens held back for a character that never ends: no character has more bytes


class TextStream:
    """The text that tokens add to a prompt; the last characters are held back while they may still change.

    ``tokenizer`` is a transformers tokenizer; special tokens have no text. Cost of a token: one short decode.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_BEFORE:])  # the tokens shown last, and those after them
        self._read = len(self._ids)
        self._shown = len(self._decode().rstrip(_BROKEN))  # a prompt may end within a character

    def push(self, token: int) -> str:
        """Whole characters that are now certain."""
        self._ids.append(token)
        return self._new(final=len(self._ids) - self._read > _LONGEST)

    def finish(self) -> str:
        """What was held back; bytes that are no text come out as replacement characters."""
        return self._new(final=True)

    def _new(self, final: bool) -> str:
        text = self._decode()
        new = text[self._shown :]
        if (not new or text.endswith(_BROKEN)) and not final:
            return ""
        self._ids = self._ids[self._read :]
        self._read, self._shown = len(self._ids), len(self._decode())
        return new

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True)) if self._ids else ""


class Stops:
    """Ends a text before the first of several strings; what may be the beginning of one is held back."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [s for s in strings if s]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that is certain to stay; after a stop string is ``found``, nothing."""
        if self.found:
            return ""
        self._held += text
        ends = [(at + len(s), at) for s in self._strings if (at := self._held.find(s)) >= 0]
        if ends:  # the first to be complete, however the text was cut into pieces
            self.found = True
            out, self._held = self._held[: min(ends)[1]], ""
            return out
        keep = max((_overlap(self._held, s) for s in self._strings), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop`` and is not all of it."""
    at = max(0, len(text) - len(stop) + 1)
    while (at := text.find(stop[0], at)) >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at += 1
    return 0
