"""What a report shows, as plain values: whoever builds a ``Report`` needs no chart, no HTML and no model.

Every number was measured before it came here. Sizes are stored bytes, KL and log-perplexity are in nats a
token, positions and blocks count from 0. Tuples instead of lists: a report is a value and can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowbit.errors import StudyError
from lowbit.evaluation.findings import Finding
from lowbit.evaluation.task_findings import TaskFinding
from lowbit.report.panel import Panel
from lowbit.report.work import Work

FlipKind = Literal["lost", "gained", "other"]
"""Who was right: ``lost`` only the reference, ``gained`` only the candidate, ``other`` neither."""


@dataclass(frozen=True)
class Band:
    """Mean KL in nats over the ``n`` tokens at positions ``low_pos <= position < high_pos`` of their window."""

    low_pos: int
    high_pos: int
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class BlockKL:
    """Mean KL in nats of the model in which only block number ``block`` is quantized."""

    block: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class FlipRow:
    """One token on which the two models choose differently; ``margin_ref`` is p(first) - p(second) of the reference."""

    context: str
    target: str
    reference_choice: str
    candidate_choice: str
    margin_ref: float
    kind: FlipKind


@dataclass(frozen=True)
class LostItem:
    """A question that the reference answered rightly and the candidate did not; ``margin_ref`` is how sure it was.

    ``prompt`` is without the examples that may have stood before it, and empty where the records are not files.
    """

    task: str
    id: str
    prompt: str
    reference_answer: str
    candidate_answer: str
    margin_ref: float


@dataclass(frozen=True)
class Candidate:
    """One version of a model, measured.

    ``bytes_total`` is everything stored; ``bits_per_weight`` is over the quantized linears only, scales and
    tables included. ``seconds`` and ``peak_bytes`` are the cost of making it. ``lost_items`` are the first of those
    that it lost on tasks, not all.
    """

    label: str
    model_label: str
    recipe: str
    digest: str
    bytes_total: int
    bits_per_weight: float
    seconds: float
    peak_bytes: int
    findings: tuple[Finding, ...] = ()
    kl_by_position: tuple[Band, ...] = ()
    kl_by_block: tuple[BlockKL, ...] = ()
    flips: tuple[FlipRow, ...] = ()
    task_findings: tuple[TaskFinding, ...] = ()
    lost_items: tuple[LostItem, ...] = ()
    is_reference: bool = False

    def finding(self, metric: str) -> Finding | None:
        """The finding of that metric, or None."""
        return next((f for f in self.findings if f.metric == metric), None)


@dataclass(frozen=True)
class ScoringProtocol:
    """How every number was scored: a perplexity without these means nothing. ``tokens`` is 0 where no text was."""

    text: str
    digest: str
    windows: int
    length: int
    tokens: int
    clusters: int
    dtype: str


@dataclass(frozen=True)
class Environment:
    """Where it ran: package names with their versions, and the machine in words."""

    versions: tuple[tuple[str, str], ...]
    machine: str


@dataclass(frozen=True)
class Report:
    """One study: a reference, its low-bit versions, and everything needed to judge or repeat the comparison.

    ``noise_floor`` is the KL in nats of the reference against itself under another batch size, or None when
    it was not measured. ``created`` is ISO 8601. ``configuration`` and ``digests`` are (name, value) rows.
    ``task_notes`` say what qualifies the tasks; ``families`` are (task, family) rows.
    Raises ``StudyError`` when two versions share a label, or when the reference is not marked as one.
    """

    title: str
    created: str
    command: str
    study_name: str
    reference: Candidate
    candidates: tuple[Candidate, ...]
    noise_floor: float | None
    protocol: ScoringProtocol
    environment: Environment
    multiplicity_rule: str
    configuration: tuple[tuple[str, str], ...] = ()
    digests: tuple[tuple[str, str], ...] = ()
    task_notes: tuple[str, ...] = ()
    families: tuple[tuple[str, str], ...] = ()

    @property
    def has_tokens(self) -> bool:
        """Whether a text was scored; without, the versions only answered tasks."""
        return self.protocol.tokens > 0

    def __post_init__(self) -> None:
        marked = [c.label for c in self.candidates if c.is_reference]
        if not self.reference.is_reference or marked:
            raise StudyError(
                "the reference must be marked is_reference, and nothing else",
                where=f"report {self.study_name!r}: {', '.join(marked) or self.reference.label}",
                why="Every difference is measured against exactly one reference.",
                fix="pass it as Report.reference and leave it out of Report.candidates",
            )
        labels = [self.reference.label, *(c.label for c in self.candidates)]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise StudyError(
                f"two versions are called {', '.join(map(repr, twice))}",
                where=f"report {self.study_name!r}",
                why="Rows and marks are told apart by their label.",
                fix="give every cell of the study its own label",
            )


@dataclass(frozen=True)
class StudyReport:
    """A whole study: a report a model, and what its analyses found over one model or all.

    ``created`` is ISO 8601; ``command`` is shown as what made it; ``work`` is how far its cells are. Without ``work``
    it raises StudyError when it has no report: with it, there is at least that to show.
    """

    name: str
    created: str
    command: str
    reports: tuple[Report, ...]
    panels: tuple[Panel, ...] = ()
    work: Work | None = None

    @classmethod
    def alone(cls, report: Report) -> StudyReport:
        """A study of one model."""
        return cls(report.study_name, report.created, report.command, (report,))

    def __post_init__(self) -> None:
        if not self.reports and self.work is None:
            raise StudyError(
                "no model's original is scored yet, so there is nothing to report", where=f"study {self.name!r}",
                why="every number is a difference from an original", fix="lowbit study run, which goes on where it was",
            )  # fmt: skip
