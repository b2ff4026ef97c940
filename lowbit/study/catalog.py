"""The catalogue: what models and low-bit versions there were, what they were made from, and what they scored.

One JSON object a line in one file of the cache folder, only ever appended to, under a lock: two processes may write at
once, and a line that a crash cut short is refused by its number. An artefact is known by the digest of its bytes
(docs/decisions/0002-identity-is-bytes.md); names are for people.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lowbit import digest
from lowbit.errors import EvidenceError, StorageError, StudyError, nearest

_PROTOCOL = ("text", "digest", "windows", "length", "tokens", "dtype")
_SHORTEST = 4  # hexadecimal digits of an abbreviated digest
_VERSION = 1
T = TypeVar("T")


@dataclass(frozen=True)
class Artefact:
    """Files of a model, at one place, as they were when they were added."""

    digest: str
    name: str
    path: str
    kind: str
    """``dense``, ``lowbit``, or the layout of another ecosystem."""
    recipe: str
    parents: tuple[str, ...]
    """Digests of what it was made from; none for an original."""
    nbytes: int
    """Of the stored weights; 16 bit is counted for originals in 32."""
    bits_per_weight: float
    """Over the low-bit linears only, scales and tables included."""
    files: tuple[tuple[str, str], ...]
    """Name and sha256 of every weight file."""
    calibration: str | None
    """Digest of the calibration tokens, None when none were used or nobody knows."""
    lowbit: str
    added: str
    """ISO 8601."""


@dataclass(frozen=True)
class Score:
    """What ``lowbit compare`` found of an artefact: findings mean something beside this reference and protocol only."""

    digest: str
    """Of the artefact."""
    reference: str
    """Digest of the model that it was compared with."""
    protocol: tuple[tuple[str, Any], ...]
    findings: tuple[tuple[str, Mapping[str, Any]], ...]
    """Metric and the fields of its finding."""
    created: str

    def differences(self, other: Score) -> list[str]:
        """In what two scores were measured differently, in words; empty when they may stand side by side."""
        a, b = dict(self.protocol), dict(other.protocol)
        told = [f"{name} {_brief(a[name])} and {_brief(b[name])}" for name in _PROTOCOL if a[name] != b[name]]
        if self.reference != other.reference:
            told.append(f"reference {digest.short(self.reference)} and {digest.short(other.reference)}")
        return told


class Comparison(NamedTuple):
    """Two artefacts with the scores that may stand side by side; None where neither has any."""

    a: Artefact
    b: Artefact
    scores: tuple[Score, Score] | None


class Catalog:
    """The records of a file; ``path`` None means that of the cache folder. Raises StudyError for a damaged line."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or digest.cache_folder() / "catalog.jsonl"
        self.artefacts: dict[str, Artefact] = {}
        self.scores: dict[str, list[Score]] = {}
        for kind, record in self._records():
            self._take(kind, record)

    def add(self, artefact: Artefact, scores: list[Score]) -> bool:
        """Record what is not there yet; whether anything was. One of the same digest and another name replaces it."""
        known = self.artefacts.get(artefact.digest)
        news: list[tuple[str, Artefact | Score]] = []
        if known is None or asdict(known) | {"added": ""} != asdict(artefact) | {"added": ""}:
            news.append(("artefact", artefact))
        news += [("score", score) for score in scores if score not in self.scores.get(artefact.digest, [])]
        self._append(news)
        for kind, record in news:
            self._take(kind, record)
        return bool(news)

    def find(self, word: str) -> Artefact:
        """The artefact of a digest, of its first digits, or of a name. Raises StudyError when that is none or many."""
        found = [a for a in self.artefacts.values() if a.digest == word]
        found = found or [a for a in self.artefacts.values() if len(word) >= _SHORTEST and a.digest.startswith(word)]
        found = found or [a for a in self.artefacts.values() if a.name == word]
        if len(found) == 1:
            return found[0]
        if found:
            which = ", ".join(digest.short(a.digest) for a in found)
            raise StudyError(f"{word!r} is {len(found)} artefacts: {which}", where=str(self.path), fix="more digits")
        names = [a.name for a in self.artefacts.values()]
        fix = nearest(word, names) if names else "lowbit catalog add DIR"
        raise StudyError(f"knows no {word!r}", where=str(self.path), fix=fix)

    def ancestors(self, artefact: Artefact) -> list[str]:
        """Digests of what it was made from, and of what that was made from, up to what nobody has recorded."""
        line: list[str] = []
        waiting = list(artefact.parents)
        while waiting:
            parent = waiting.pop(0)
            if parent in line or parent == artefact.digest:
                continue  # records of people are no proof against circles
            line.append(parent)
            waiting += self.artefacts[parent].parents if parent in self.artefacts else ()
        return line

    def children(self, key: str) -> list[Artefact]:
        """What was made from an artefact, or from a digest that nobody has recorded."""
        return [a for a in self.artefacts.values() if key in a.parents]

    def compare(self, a: Artefact, b: Artefact) -> Comparison:
        """Two artefacts, with their latest scores of one protocol.

        Raises EvidenceError, saying in what they differ, when both have scores and no two were measured alike.
        """
        pairs = [(x, y) for x in self.scores.get(a.digest, []) for y in self.scores.get(b.digest, [])]
        alike = [pair for pair in pairs if not pair[0].differences(pair[1])]
        if pairs and not alike:
            told = "; ".join(pairs[-1][0].differences(pairs[-1][1]))
            raise EvidenceError(
                f"scores of different protocols: {told}", where=f"{a.name} and {b.name}",
                why="Numbers over other texts or windows, or beside another original, say nothing about each other.",
                fix="lowbit compare ORIGINAL A B --json, then lowbit catalog add with it",
            )  # fmt: skip
        return Comparison(a, b, alike[-1] if alike else None)

    def _take(self, kind: str, record: Artefact | Score) -> None:
        if isinstance(record, Artefact):
            self.artefacts[record.digest] = record
        else:
            held = self.scores.setdefault(record.digest, [])
            if record not in held:
                held.append(record)

    def _records(self) -> Iterator[tuple[str, Artefact | Score]]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(f"cannot be read: {error}", where=str(self.path)) from error
        for number, line in enumerate(lines, start=1):
            try:
                value = json.loads(line)
                yield value["kind"], _READERS[value["kind"]](value["version"], value["record"])
            except (ValueError, TypeError, KeyError) as error:
                raise StudyError(
                    f"line {number} is no record: {error}", where=str(self.path),
                    why="What is cut short or altered is not guessed.", fix="remove that line, and add again",
                ) from error  # fmt: skip

    def _append(self, records: list[tuple[str, Artefact | Score]]) -> None:
        if not records:
            return
        rows = [{"kind": kind, "version": _VERSION, "record": asdict(record)} for kind, record in records]
        text = "".join(digest.canonical(row) + "\n" for row in rows).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"cannot be written: {error}", where=str(self.path)) from error


def scores_of(report: Mapping[str, Any], key: str) -> Score:
    """The score of the artefact of digest ``key`` in one report of ``lowbit compare --json``.

    Raises StudyError when the report is about other files, or no report.
    """
    try:
        found = {c["digest"]: c for c in report["candidates"]}
        if key not in found:
            seen = ", ".join(f"{c['label']} {digest.short(c['digest'])}" for c in found.values())
            raise StudyError(
                f"has no scores of {digest.short(key)}, but of {seen or 'nothing'}", where="scores",
                why="Scores belong to bytes, not to names.", fix="lowbit compare again, with these files",
            )  # fmt: skip
        protocol = {name: report["protocol"][name] for name in _PROTOCOL}
        findings = {f["metric"]: {k: v for k, v in f.items() if k != "metric"} for f in found[key]["findings"]}
        reference, created = report["reference"]["digest"], report["created"]
    except (KeyError, TypeError) as error:
        raise StudyError(f"is no output of lowbit compare --json: {error!r}", where="scores") from error
    return _score(_VERSION, {"digest": key, "reference": reference, "protocol": list(protocol.items()),
                             "findings": list(findings.items()), "created": created})  # fmt: skip


def _artefact(version: int, record: Mapping[str, Any]) -> Artefact:
    value = _fields(Artefact, version, record)
    if not (isinstance(value["digest"], str) and isinstance(value["nbytes"], int)):
        raise TypeError("digest and nbytes")
    parents, files = tuple(map(str, value["parents"])), tuple((str(n), str(h)) for n, h in value["files"])
    return Artefact(**{**value, "parents": parents, "files": files})


def _score(version: int, record: Mapping[str, Any]) -> Score:
    value = _fields(Score, version, record)
    protocol = {str(name): setting for name, setting in value["protocol"]}
    if set(protocol) != set(_PROTOCOL):
        raise TypeError(f"protocol of {', '.join(protocol)}")
    findings = tuple((str(metric), {**finding}) for metric, finding in value["findings"])
    if any(not isinstance(f.get(end), int | float) for _, f in findings for end in ("value", "low", "high")):
        raise TypeError("a finding without its interval")
    return Score(**{**value, "protocol": tuple(protocol.items()), "findings": findings})


_READERS: dict[str, Callable[[int, Mapping[str, Any]], Artefact | Score]] = {"artefact": _artefact, "score": _score}


def _fields(cls: type, version: int, record: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(cls)}
    if version != _VERSION or set(record) != names:
        raise ValueError(f"version {version} with {', '.join(sorted(set(record) ^ names)) or 'its fields'}")
    return dict(record)


def _brief(value: object) -> str:
    return digest.short(value) if isinstance(value, str) and len(value) == 64 else str(value)
