"""What the versions of one model wrote, as its cells left it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from lowbit.evaluation import sampler_evidence
from lowbit.evaluation.metrics.generations import Texts, joined
from lowbit.evaluation.sampler import Gap, Setting
from lowbit.evaluation.sampler_evidence import Costs
from lowbit.study.view import Model


@dataclass(frozen=True)
class Version:
    """One model that wrote; ``gaps`` is empty for the original."""

    label: str
    recipe: str
    bits: float
    """A weight, of the quantized linears."""
    texts: Mapping[Setting, Texts]
    costs: Costs
    gaps: Mapping[Setting, Gap]

    @cached_property
    def all(self) -> Texts:
        """Over all settings."""
        return joined(list(self.texts.values()))

    @cached_property
    def drawn(self) -> Texts | None:
        """Over the settings with a temperature above 0."""
        parts = [t for setting, t in self.texts.items() if setting.temperature > 0]
        return joined(parts) if parts else None

    @property
    def greedy(self) -> Texts | None:
        """At temperature 0."""
        return self.texts.get(Setting(0.0))


@dataclass(frozen=True)
class Wrote:
    """The original, and what of its versions is done, in the order of the study."""

    original: Version
    versions: tuple[Version, ...]
    steps: int
    """``max_new_tokens``."""
    lengths: tuple[int, ...]
    """Smaller ones that are read off the same texts."""

    @property
    def settings(self) -> list[Setting]:
        return list(self.original.texts)

    @property
    def prompts(self) -> int:
        return len(set(self.original.all.prompt.tolist()))


def of_model(model: Model) -> Wrote | None:
    """Texts that pair, or None while the original's or every version's are missing. Raises EvidenceError."""
    grid = model.grid.texts
    if grid is None or (folder := model.folder(grid.reference)) is None:
        return None
    base, provenance = sampler_evidence.read_texts(folder)
    original = Version(model.name, "", 16.0, base, sampler_evidence.read_costs(folder), {})
    versions = []
    for entry, candidate in model.candidates():
        if (folder := model.folder(grid.versions[entry.label])) is None:
            continue
        texts, own = sampler_evidence.read_texts(folder)
        own.require_comparable(provenance)
        for setting, one in base.items():
            one.require_paired(texts[setting])
        costs, gaps = sampler_evidence.read_costs(folder), sampler_evidence.read_gaps(folder)
        versions.append(Version(entry.label, entry.recipe, candidate.bits_per_weight, texts, costs, gaps))
    if not versions:
        return None
    steps = original.all.token.shape[1]
    return Wrote(original, tuple(versions), steps, tuple(sorted(set(grid.settings.lengths))))
