"""The shapes of records, one JSON object a line; a record that has another is refused with file, line and schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowbit.errors import EvidenceError


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_some_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 1 and all(map(_is_some_text, value))


def _are_several(value: Any) -> bool:
    return _are_texts(value) and len(value) >= 2


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_flags(value: Any) -> bool:
    return isinstance(value, list) and all(flag in (0, 1) for flag in value) and 0 < sum(value) < len(value)


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_are_several(p) and len(p) == 2 for p in value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "a text": _is_some_text, "a text, which may be empty": _is_text, "a list of texts": _are_texts,
    "a list of two texts or more": _are_several, "an index from 0": _is_index,
    "a list of 0 and 1, some of each": _are_flags, "a list of [key, value]": _are_pairs,
}  # fmt: skip
TEXT, ANY_TEXT, TEXTS, SEVERAL, INDEX, FLAGS, PAIRS = _KINDS


@dataclass(frozen=True)
class Schema:
    """Fields that a record must have, each with its kind, and optional ones; others are ignored.

    ``indexes`` names the list that ``answer`` points into, ``beside`` two lists of one length.
    """

    name: str
    fields: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)
    indexes: str = ""
    beside: tuple[str, str] | None = None

    def check(self, value: Any, where: str) -> None:
        """Raises EvidenceError naming ``where`` (file and line), the field, and the schema."""
        if not isinstance(value, dict):
            raise self._refused("is no JSON object", where)
        for name, kind in self.fields.items():
            if name not in value:
                raise self._refused(f"has no field {name!r}", where)
            self._require(value[name], name, kind, where)
        for name, kind in self.optional.items():
            if value.get(name) is not None:
                self._require(value[name], name, kind, where)
        if self.indexes and value["answer"] >= len(value[self.indexes]):
            raise self._refused(f"answer {value['answer']} of {len(value[self.indexes])} {self.indexes}", where)
        if self.beside and len(value[self.beside[0]]) != len(value[self.beside[1]]):
            raise self._refused(f"{self.beside[0]} and {self.beside[1]} differ in length", where)

    def fits(self, value: Any) -> bool:
        """Whether a record has the fields, whatever their kinds."""
        return isinstance(value, dict) and all(name in value for name in self.fields)

    def _require(self, value: Any, name: str, kind: str, where: str) -> None:
        if not _KINDS[kind](value):
            raise self._refused(f"{name} is {_shown(value)}, not {kind}", where)

    def _refused(self, what: str, where: str) -> EvidenceError:
        fields = ", ".join(f"{name} ({kind})" for name, kind in self.fields.items())
        return EvidenceError(what, where=where, why=f"the schema {self.name!r} has: {fields}", fix="correct the record")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


ID = {"id": TEXT}
CHOICE = Schema("choice", ID | {"context": TEXT, "choices": SEVERAL, "answer": INDEX}, indexes="choices")
CHOICE_CTX = Schema("choice-ctx", ID | {"contexts": SEVERAL, "continuation": TEXT, "answer": INDEX}, indexes="contexts")
MULTI_TRUE = Schema(
    "multi-true", ID | {"context": TEXT, "choices": SEVERAL, "labels": FLAGS}, beside=("choices", "labels")
)
CLOZE = Schema("cloze", ID | {"context": TEXT, "target": TEXT})
GENERATION = Schema("generation", ID | {"prompt": TEXT, "answer": TEXT}, {"rationale": ANY_TEXT, "task": TEXT})
PROMPTS = Schema("prompts", ID | {"task": TEXT, "prompt": TEXT})
CODE = Schema("code", ID | {"prompt": TEXT, "entry_point": TEXT, "test": TEXT})
PAIR = Schema(
    "pair", ID | {"stereotyped": TEXT, "anti_stereotyped": TEXT}, {"bias_type": TEXT, "target": TEXT, "unrelated": TEXT}
)
TRIPLE = Schema("pair with unrelated", {**PAIR.fields, "unrelated": TEXT}, {"bias_type": TEXT, "target": TEXT})
PREFERENCE = Schema("preference", ID | {"preferred": TEXT, "dispreferred": TEXT})
DIALOGUE = Schema("dialogue", ID | {"turns": TEXTS}, {"category": TEXT})
KV = Schema("kv", ID | {"records": PAIRS, "key": TEXT, "answer": TEXT})
BBQ = Schema(
    "choice of BBQ",
    {**CHOICE.fields, "category": TEXT, "context_condition": TEXT, "question_polarity": TEXT, "unknown_choice": INDEX},
    {"stereotyped_group_choice": INDEX},
    indexes="choices",
)
MMLU = Schema("choice with subject", {**CHOICE.fields, "subject": TEXT}, indexes="choices")
OF_TASK = Schema("generation with task", {**GENERATION.fields, "task": TEXT})
OF_ADVERSARY = Schema("choice with task", {**CHOICE.fields, "task": TEXT}, indexes="choices")
