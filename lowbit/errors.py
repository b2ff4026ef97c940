"""Every error that a user can meet, as one tree.

    LowbitError
    ├── RecipeError            a recipe, preset or option that means nothing (carries the nearest name)
    ├── FormatError            a number format that this tensor cannot take
    ├── ModelError             a model directory or file that cannot be read
    │   ├── WeightError        a weight that is missing, misshapen, NaN or infinite (named by layer)
    │   └── CoverageError      linears that a recipe left unquantized without saying why
    ├── CheckpointError        a low-bit checkpoint that is truncated, altered, too large or of an unknown version
    ├── CalibrationError       text that is missing or too short; statistics that a method cannot use
    │   └── GramError          a Gram matrix that is not positive definite
    ├── ExportError            a model that another ecosystem's files cannot hold as it is
    ├── StorageError           no space, no permission, or another process owns the output
    ├── StudyError             a study file, store or cell that cannot be used
    ├── EvidenceError          two pieces of evidence that must not be compared
    └── MissingExtra           an optional dependency (names the extra to install)

A message says what happened, where (layer, shape, file, field), why it matters, and what to try. To handle
any of them: ``try: ... except lowbit.LowbitError as e: print(e)``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LowbitError(Exception):
    """Base of the tree: ``what`` went wrong, ``where``, ``why`` it matters, what to ``try``."""

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        parts = [f"{where}: {what}" if where else what]
        if why:
            parts.append(why)
        if fix:
            parts.append(f"Try: {fix}")
        super().__init__("\n".join(parts))

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments survive a trip between processes
        return _rebuild, (type(self), self.what, self.where, self.why, self.fix)


def _rebuild(cls: type[LowbitError], what: str, where: str, why: str, fix: str) -> LowbitError:
    return cls(what, where=where, why=why, fix=fix)


class RecipeError(LowbitError):
    """A recipe, preset or option that means nothing."""


class FormatError(LowbitError):
    """A number format that this tensor cannot take."""


class ModelError(LowbitError):
    """A model directory or file that cannot be read."""


class WeightError(ModelError):
    """A weight that is missing, misshapen, NaN or infinite."""


class CoverageError(ModelError):
    """Linears that a recipe left unquantized without saying why."""


class CheckpointError(LowbitError):
    """A low-bit checkpoint that is truncated, altered, too large or of an unknown version."""


class ExportError(LowbitError):
    """A model that another ecosystem's files cannot hold as it is."""


class CalibrationError(LowbitError):
    """Text that is missing or too short, or statistics that a method cannot use."""


class GramError(CalibrationError):
    """A Gram matrix that is not positive definite."""


class StorageError(LowbitError):
    """No space, no permission, or another process owns the output."""


class StudyError(LowbitError):
    """A study file, store or cell that cannot be used."""


class EvidenceError(LowbitError):
    """Two pieces of evidence that must not be compared."""


class MissingExtra(LowbitError):
    """An optional dependency is not installed."""

    @classmethod
    def of(cls, package: str, extra: str) -> MissingExtra:
        return cls(f"{package} is not installed", fix=f"pip install 'lowbit[{extra}]'")


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence with the known name closest to ``name``, or the list of all when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(known)}"
