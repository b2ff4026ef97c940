"""Runs analyses over a study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from lowbit.report.panel import Panel
from lowbit.study.view import View

Analysis = Callable[[View], Sequence[Panel]]
"""Panels, in their order; none where the study has no evidence (yet) for it. Raises StudyError for a study that cannot
have any, naming what its file must say."""


def analyse(view: View, names: Sequence[str]) -> list[Panel]:
    """What the named analyses found (``analyses.ANALYSES``), in the order of the names."""
    return [panel for name in names for panel in _load(name)(view)]


def _load(name: str) -> Analysis:
    function: Analysis = import_module(f"lowbit.study.analyses.{name}").panels
    return function
