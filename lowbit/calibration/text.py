"""Text for calibration and evaluation: named, digested, packed to a length.

Where nothing is named, text is CPython's own help (``pydoc_data.topics``, about half a megabyte of English that every
Python ships). Its topics quote each other, so those with a passage in common form a group, and whole groups are dealt
to the two roles: no passage serves both.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lowbit import digest
from lowbit.arrays import Int, Tensor
from lowbit.errors import CalibrationError

Role = Literal["calibration", "evaluation"]
DEFAULT = "pydoc"
SYNTHETIC = ("self", "random")  # names of calibration without text (synthetic.py); a file so called is ./self
_PASSAGE = 80  # characters of a paragraph that make it more than a phrase


@dataclass(frozen=True)
class Text:
    """A named text and the sha256 of its bytes."""

    name: str
    content: str

    @property
    def digest(self) -> str:
        return digest.of_bytes(self.content.encode())


@dataclass(frozen=True)
class Tokens:
    """Token windows of one length, and the text or the generator (``self``, ``random``) that they came from."""

    ids: Int[Tensor, "windows length"]
    text: str
    text_digest: str
    seed: int | None

    @property
    def digest(self) -> str:
        """Identity of exactly these tokens."""
        return digest.of_tensor(self.ids)


def read(name: str, role: Role) -> Text:
    """The text of a file, or of the built-in name ``pydoc`` in its role. Raises CalibrationError for any other."""
    if name == DEFAULT:
        return Text(f"{DEFAULT}:{role}", _pydoc(role))
    if name in SYNTHETIC:
        raise CalibrationError(
            f"{name!r} is no text: its tokens are made, for calibration", where=name,
            why="a model that is judged by its own text is judged by what it already says",
            fix=f"a UTF-8 file, or {DEFAULT!r}; a file of this name is ./{name}",
        )  # fmt: skip
    path = Path(name).expanduser()
    try:
        return Text(path.name, path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CalibrationError(
            f"is no readable text file: {error.strerror}", where=name, fix=f"a UTF-8 file, or {DEFAULT!r}"
        ) from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"is not UTF-8: {error}", where=name) from error


def sample(text: Text, tokenizer: Any, samples: int, length: int, seed: int | None) -> Tokens:
    """``samples`` non-overlapping windows of ``length`` tokens; the first ones, or drawn with ``seed``.

    The whole text is tokenized once, without special tokens. Raises CalibrationError when it is too short.
    """
    ids = encode(text, tokenizer)
    windows = ids.numel() // length
    if windows < samples:
        raise CalibrationError(
            f"has {ids.numel()} tokens, {samples} windows of {length} need {samples * length}", where=text.name,
            why="statistics from fewer tokens than asked would be reported as more",
            fix=f"a longer text, at most {windows} samples, or a shorter length",
        )  # fmt: skip
    chosen = torch.arange(samples)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(windows, generator=generator)[:samples].sort().values
    return Tokens(ids[: windows * length].view(windows, length)[chosen], text.name, text.digest, seed)


def encode(text: Text, tokenizer: Any) -> Int[Tensor, "tokens"]:
    """All tokens of a text, without special tokens."""
    encoded = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(encoded, dtype=torch.int64)


@functools.cache
def _pydoc(role: Role) -> str:
    """The topics of a role in alphabetical order; the largest groups are dealt first, each to the shorter role."""
    from pydoc_data.topics import topics

    names: dict[Role, list[str]] = {"calibration": [], "evaluation": []}
    length: dict[Role, int] = {"calibration": 0, "evaluation": 0}
    sizes = {group: sum(len(topics[name]) for name in group) for group in _groups(topics)}
    for group in sorted(sizes, key=lambda group: (-sizes[group], group)):
        shorter: Role = "calibration" if length["calibration"] <= length["evaluation"] else "evaluation"
        names[shorter] += group
        length[shorter] += sizes[group]
    return "\n\n".join(topics[name] for name in sorted(names[role]))


def _groups(topics: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Topics that share a passage, directly or through others."""
    groups: list[tuple[list[str], set[str]]] = []
    for name in sorted(topics):
        passages = {" ".join(p.split()) for p in topics[name].split("\n\n")}
        passages = {p for p in passages if len(p) >= _PASSAGE}
        touching = [group for group in groups if group[1] & passages]
        groups = [group for group in groups if not group[1] & passages]
        members = [member for group in touching for member in group[0]]
        groups.append(([*members, name], passages.union(*(group[1] for group in touching))))
    return [tuple(sorted(members)) for members, _ in groups]
