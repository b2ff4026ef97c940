"""Text as a model reads it: contexts and continuations as token ids, and whether two models read alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from lowbit import digest
from lowbit.errors import EvidenceError


class Pair(NamedTuple):
    """Token ids of a context (at least one) and of what is to be scored behind it (at least one)."""

    context: list[int]
    continuation: list[int]


class Reader:
    """A tokenizer with the conventions of likelihood tasks (those of lm-eval, so that numbers can be compared).

    Spaces at the end of a context belong to the continuation; both are tokenized as one text and cut after as many
    tokens as the context has alone. An empty context is the tokenizer's begin token, or its end token without one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if begin is None:
            raise EvidenceError(
                "the tokenizer has neither a begin nor an end token", where=type(tokenizer).__name__,
                why="texts without a context have nothing to stand behind", fix="set bos_token in its configuration",
            )  # fmt: skip
        self.prefix = int(begin)
        self._prefix_text = tokenizer.decode([self.prefix])
        self._contexts: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless the text begins with one."""
        special = not (self._prefix_text and text.startswith(self._prefix_text))
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    def prompt(self, text: str) -> list[int]:
        """Token ids of a text to be continued, at least one."""
        return self.encode(text) or [self.prefix]

    def pair(self, context: str, text: str) -> Pair:
        """Raises EvidenceError for a text that has no tokens of its own behind its context."""
        if not context:
            found = Pair([self.prefix], list(self.tokenizer.encode(text, add_special_tokens=False)))
        else:
            trimmed = context.rstrip()
            text = context[len(trimmed) :] + text
            head = self._context(trimmed)
            found = Pair(head, self.encode(trimmed + text)[len(head) :])
            if not head:  # a context of spaces only
                found = Pair([self.prefix], found.continuation)
        if not found.continuation:
            raise EvidenceError(
                f"{text!r} has no tokens behind its context", where="tokenizer", fix="another text or another tokenizer"
            )
        return found

    def _context(self, text: str) -> list[int]:
        if text not in self._contexts:
            if len(self._contexts) > 64:  # choices of one question follow each other
                self._contexts.clear()
            self._contexts[text] = self.encode(text)
        return self._contexts[text]

    @property
    def identity(self) -> str:
        """Digest of the vocabulary and of how text becomes its tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        how = "" if backend is None else _stable(backend.to_str())
        return digest.of_value([sorted(self.tokenizer.get_vocab().items()), how, self.prefix])


def require_same(reference: Any, candidate: Any) -> None:
    """Raises EvidenceError, with the first difference, unless both tokenizers read alike.

    Compared are every token by its id, then the ids of a text with words, numbers, spaces and signs of many kinds.
    """
    first, second = ({i: t for t, i in tok.get_vocab().items()} for tok in (reference, candidate))
    why = "log-likelihoods over other tokens do not compare"
    for i in sorted(first.keys() | second.keys()):
        if first.get(i) != second.get(i):
            raise EvidenceError(
                f"token {i} is {_named(first, i)} in the reference and {_named(second, i)} in the candidate",
                where="tokenizer", why=why, fix="a candidate with the reference's tokenizer",
            )  # fmt: skip
    for text in _PROBES:
        mine, theirs = list(reference.encode(text)), list(candidate.encode(text))
        if mine != theirs:
            raise EvidenceError(
                f"{text!r} is {mine} in the reference and {theirs} in the candidate", where="tokenizer", why=why,
                fix="a candidate with the reference's tokenizer",
            )  # fmt: skip


def _named(vocabulary: Mapping[int, str], i: int) -> str:
    return repr(vocabulary[i]) if i in vocabulary else "missing"


def _stable(text: str) -> str:
    """A tokenizer's own description without what a call may have left in it (padding and truncation)."""
    value = json.loads(text)
    value.pop("padding", None)
    value.pop("truncation", None)
    return digest.of_value(value)


_PROBES = (
    "The quick brown fox, 1234567 times.", "  two  spaces\tand a tab\n\nand lines", "naïve café, Straße, 東京, 🙂",
    "def f(x):\n    return x ** 2  # ok", "don't WON'T it's", "",
)  # fmt: skip
