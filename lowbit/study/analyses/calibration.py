"""What the calibration text changes, beside what the draw of its windows changes. Needs ``[calibrations]``.

A version is a recipe made with one text and one seed. Every version is scored on the same tokens, so differences are
paired by token; the seeds of a text are its replicates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lowbit.calibration.text import DEFAULT, SYNTHETIC
from lowbit.errors import StudyError
from lowbit.report import text
from lowbit.report.panel import Curves, Mark, Panel, Titled
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study.analyses.judged import RULE, Statement, claims, spelled
from lowbit.study.analyses.replicates import Components, components, contrast
from lowbit.study.view import Model, View

SELF, RANDOM = SYNTHETIC
_LLMC, _LLMQAT, _AWQ = "arXiv:2405.06001", "arXiv:2305.17888", "arXiv:2306.00978"
_SELF_TIMES = 1.25  # acceptance A15.1
_ENTRY = re.compile(r"^(?P<recipe>.*) \((?P<text>.*), seed (?P<seed>\d+)\)$")
_MEASURES = {"kl": "KL", "nll": "Δ log-ppl"}


class Recipe(NamedTuple):
    """One recipe over texts and seeds; ``kl`` and ``nll`` (less the original's) are in nats by text."""

    name: str
    seeds: Mapping[str, tuple[int, ...]]
    kl: Mapping[str, Float[np.ndarray, "seeds tokens"]]
    nll: Mapping[str, Float[np.ndarray, "seeds tokens"]]
    cluster: Int[np.ndarray, " tokens"]

    def losses(self, measure: str) -> Mapping[str, Float[np.ndarray, "seeds tokens"]]:
        return self.kl if measure == "kl" else self.nll


def panels(view: View) -> list[Panel]:
    """One a model with two texts or two seeds of a recipe. Raises StudyError for a study without ``[calibrations]``."""
    if not any(_ENTRY.match(e.label) for model in view.models for e in model.grid.entries):
        raise StudyError(
            "the analysis of calibration has nothing to compare", where=f"study {view.name!r}",
            why="its recipes are not calibrated, or each was made with one text and one seed",
            fix='[calibrations] with texts = ["pydoc", "self"] and seeds = [0, 1, 2]',
        )  # fmt: skip
    found = []
    for i, model in enumerate(view.models):
        recipes = [r for r in recipes_of(model) if len(r.kl) > 1 or any(len(s) > 1 for s in r.seeds.values())]
        if recipes:
            title = view.titled("What the calibration text changes", model)
            found.append(panel(f"calibration-{i}", title, recipes, model.grid.reference.params["text"]))
    return found


def recipes_of(model: Model) -> Iterator[Recipe]:
    """The scored versions by recipe, text and seed, in the study's order."""
    held: dict[str, dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]] = {}
    cluster: Int[np.ndarray, " tokens"] = np.zeros(0, dtype=np.int32)
    for entry, _ in model.candidates():
        match, tokens = _ENTRY.match(entry.label), model.tokens(entry.score)
        if match is not None and tokens is not None:
            change = tokens.nll.astype(np.float64) - tokens.nll_ref
            of_text = held.setdefault(match["recipe"], {}).setdefault(match["text"], {})
            of_text[int(match["seed"])] = tokens.kl.astype(np.float64), change
            cluster = tokens.cluster
    for name, of_texts in held.items():
        kl, nll = ({t: np.stack([v[k] for v in s.values()]) for t, s in of_texts.items()} for k in (0, 1))
        yield Recipe(name, {t: tuple(s) for t, s in of_texts.items()}, kl, nll, cluster)


def kind(calibration: str, evaluation: str) -> str:
    """``self`` and ``random`` are themselves; another text is ``matched`` where both names begin with one word.

    ``wikitext2_train_1mb.txt`` is matched to ``wikitext2_test.txt``, and ``pydoc`` to ``pydoc``; others are shifted.
    """
    if calibration in SYNTHETIC:
        return calibration
    return "matched" if _corpus(calibration) == _corpus(evaluation) else "shifted"


def _corpus(name: str) -> str:
    return re.split(r"[^0-9a-z]", Path(name).name.lower())[0]


def panel(key: str, title: str, recipes: Sequence[Recipe], evaluation: str) -> Panel:
    """Of the recipes of one model, scored on the text ``evaluation``."""
    kinds = {t: kind(t, evaluation) for r in recipes for t in r.kl}
    statements = [s for r in recipes for s in _statements(r, kinds)] + list(_across(recipes, kinds))
    spread = {(r.name, m): c for r in recipes for m in _MEASURES if (c := _components(r, m)) is not None}
    first = recipes[0]
    notes = [
        f"Scored on {Path(evaluation).name if evaluation != DEFAULT else DEFAULT}, {len(first.cluster):,} tokens in "
        f"{len(np.unique(first.cluster))} clusters. A calibration text is matched where its name and that of the "
        "scored text begin with one word, as those of parts of one corpus do.",
        "Intervals of means and differences count both draws: other seeds (windows) of a text, and other clusters of "
        "tokens. Their squared errors are added, and t has Welch-Satterthwaite's degrees of freedom. " + RULE,
        "SD between seeds is that of versions made with other windows of one text and scored on the same tokens; SD "
        "between texts is what remains beyond it (one-way variance components, F test, not adjusted).",
    ]
    if any(len(s) == 2 for r in recipes for s in r.seeds.values()):
        notes.append("Two seeds are few: by chance they can be alike, and intervals then too short. Four are better.")
    if not statements:
        notes.append(f"No claims: they need two seeds a text, and two of a matched text, {SELF!r} and {RANDOM!r}.")
    return Panel(
        key, title, tuple(_lead(recipes, kinds, spread)), claims(statements),
        (
            Titled("By calibration text", _by_text(recipes, kinds)),
            *([Titled("Between texts, and between seeds of one text", _spread(spread))] if spread else []),
            Titled("Every pair of texts", _pairs(recipes), folded=True),
        ),
        tuple(_curves(r, i) for i, r in enumerate(recipes)),
        tuple(notes),
    )  # fmt: skip


def _lead(
    recipes: Sequence[Recipe], kinds: Mapping[str, str], spread: Mapping[tuple[str, str], Components]
) -> Iterator[str]:
    for r in recipes:
        means = {t: float(v.mean()) for t, v in r.kl.items()}
        best, worst = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        least, most = (t if kinds[t] == t else f"{t} ({kinds[t]})" for t in (best, worst))
        yield (
            f"{r.name}: KL is least with {least}, {text.number(means[best])} nat, and most with {most}, "
            f"{text.number(means[worst])} nat, {text.number(means[worst] / means[best])} times "
            f"({sum(map(len, r.seeds.values()))} versions)."
        )
        if (c := spread.get((r.name, "kl"))) is not None:
            yield (
                f"{r.name}: texts differ by an SD of {text.number(c.between)} nat of KL, seeds of one text by "
                f"{_within(c)} nat; p of no difference between texts {text.p_value(c.p)}."
            )


def _within(c: Components) -> str:
    return " ".join(text.estimate(c.within, c.low, c.high))


def _statements(r: Recipe, kinds: Mapping[str, str]) -> Iterator[Statement]:
    """Of one recipe: shifted, own and random text against each other, on both measures."""
    of = {k: [t for t in r.kl if kinds[t] == k and len(r.seeds[t]) > 1] for k in ("matched", "shifted", SELF, RANDOM)}
    for m, measure in _MEASURES.items():
        losses = r.losses(m)

        def ask(source: str, claim: str, weights: Mapping[str, float], losses: Mapping[str, np.ndarray] = losses,
                measure: str = measure) -> Statement:  # fmt: skip
            found = contrast(losses, weights, r.cluster)
            seeds = ", ".join(f"{len(r.seeds[t])} seeds of {t}" for t in weights)
            told = f"{spelled(found, 'nat', signed=True)}, {seeds}, {found.n:,} tokens"
            return Statement(source, f"{r.name}: {claim} ({measure})", "above", found, told)

        for matched in of["matched"]:
            for shifted in of["shifted"]:
                yield ask(_LLMC, f"text of another kind ({shifted}) loses more than text like that which is scored "
                          f"({matched})", {shifted: 1.0, matched: -1.0})  # fmt: skip
            for own in of[SELF]:
                yield ask(_LLMQAT, f"the model's own text loses less than {_SELF_TIMES:g} times what {matched} loses",
                          {matched: _SELF_TIMES, own: -1.0})  # fmt: skip
        for own in of[SELF]:
            for random in of[RANDOM]:
                yield ask(_LLMQAT, "random tokens lose more than the model's own text", {random: 1.0, own: -1.0})


def _across(recipes: Sequence[Recipe], kinds: Mapping[str, str]) -> Iterator[Statement]:
    """GPTQ against AWQ: which of them a shift of the text costs more; one seed drew the same windows for both."""
    named = {m: [r for r in recipes if m in re.split(r"[^a-z0-9]", r.name)] for m in ("gptq", "awq")}
    for gptq in named["gptq"]:
        for awq in named["awq"]:
            shared = {t: tuple(s for s in gptq.seeds[t] if s in awq.seeds.get(t, ())) for t in gptq.kl}
            texts = [t for t, seeds in shared.items() if len(seeds) > 1]
            if gptq is awq:
                continue
            for matched in (t for t in texts if kinds[t] == "matched"):
                for shifted in (t for t in texts if kinds[t] == "shifted"):
                    more = {t: _rows(gptq, t, shared[t]) - _rows(awq, t, shared[t]) for t in (matched, shifted)}
                    found = contrast(more, {shifted: 1.0, matched: -1.0}, gptq.cluster)
                    yield Statement(
                        _AWQ, f"text of another kind ({shifted} for {matched}) costs {gptq.name} more than {awq.name} "
                        "(KL)", "above", found,
                        f"{spelled(found, 'nat', signed=True)}, {len(shared[shifted])} seeds, {found.n:,} tokens",
                    )  # fmt: skip


def _rows(r: Recipe, name: str, seeds: Sequence[int]) -> Float[np.ndarray, "seeds tokens"]:
    return r.kl[name][[r.seeds[name].index(s) for s in seeds]]


def _components(r: Recipe, measure: str) -> Components | None:
    means = [v.mean(1) for v in r.losses(measure).values()]
    return components(means) if len(means) > 1 and any(len(m) > 1 for m in means) else None


def _mean(r: Recipe, measure: str, name: str) -> Cell:
    """With its interval where there are seeds to take one from."""
    values = r.losses(measure)[name]
    if len(values) < 2:
        return Cell(text.number(float(values.mean()), signed=measure == "nll"))
    return Cell(*text.estimate(*contrast(r.losses(measure), {name: 1.0}, r.cluster)[:3], signed=measure == "nll"))


def _by_text(recipes: Sequence[Recipe], kinds: Mapping[str, str]) -> Table:
    columns = (
        Column("Recipe", numeric=False), Column("Calibration text", numeric=False), Column("Seeds"),
        Column("KL", "nat"), Column("SD of KL", "between seeds"), Column("Δ log-ppl", "nat"),
        Column("SD of Δ log-ppl", "between seeds"),
    )  # fmt: skip
    rows = []
    for r in recipes:
        for t in r.kl:
            sd = {m: float(r.losses(m)[t].mean(1).std(ddof=1)) if len(r.seeds[t]) > 1 else None for m in _MEASURES}
            rows.append(Row((
                Cell(r.name), Cell(t, kinds[t] if kinds[t] != t else ""), Cell(str(len(r.seeds[t]))),
                _mean(r, "kl", t), Cell(text.number(sd["kl"])), _mean(r, "nll", t), Cell(text.number(sd["nll"])),
            )))  # fmt: skip
    return Table(columns, tuple(rows))


def _spread(spread: Mapping[tuple[str, str], Components]) -> Table:
    columns = (
        Column("Recipe", numeric=False), Column("Measure", numeric=False), Column("SD between texts", "nat"),
        Column("SD between seeds", "nat"), Column("Share of texts", "% of variance"), Column("p", "texts are one"),
    )  # fmt: skip
    rows = []
    for (recipe, measure), c in spread.items():
        whole = c.between**2 + c.within**2
        share = 100 * c.between**2 / whole if whole else None
        rows.append(Row((
            Cell(recipe), Cell(_MEASURES[measure]), Cell(text.number(c.between)),
            Cell(*text.estimate(c.within, c.low, c.high)), Cell(text.number(share)),
            Cell(text.p_value(c.p)),
        )))  # fmt: skip
    return Table(columns, tuple(rows))


def _pairs(recipes: Sequence[Recipe]) -> Table:
    columns = (
        Column("Recipe", numeric=False), Column("Text", numeric=False), Column("less", numeric=False),
        Column("KL", "nat"), Column("Δ log-ppl", "nat"),
    )  # fmt: skip
    rows = []
    for r in recipes:
        for a, b in combinations([t for t in r.kl if len(r.seeds[t]) > 1], 2):
            found = [contrast(r.losses(m), {a: 1.0, b: -1.0}, r.cluster) for m in _MEASURES]
            rows.append(Row((Cell(r.name), Cell(a), Cell(b),
                             *(Cell(*text.estimate(*f[:3], signed=True)) for f in found))))  # fmt: skip
    return Table(columns, tuple(rows))


def _curves(r: Recipe, i: int) -> Curves:
    """A mark a version: KL against the change of log-perplexity, a series a text."""
    marks = [
        Mark(t, float(r.nll[t][k].mean()), kl, kl, kl, f"seed {seed}")
        for t in r.kl
        for k, (seed, kl) in enumerate(zip(r.seeds[t], r.kl[t].mean(1).tolist(), strict=True))
    ]
    return Curves(
        f"versions-{i}", f"Every version of {r.name}", "One mark a seed, one colour a text: marks of one colour differ "
        "by their windows alone.", "Δ log-ppl (nat)", "KL (nat)", tuple(marks), lines=False,
    )  # fmt: skip
