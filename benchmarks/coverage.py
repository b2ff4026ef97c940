"""Do printed intervals cover, and do verdicts keep their level? Simulated evaluations with a known truth.

    python benchmarks/coverage.py --runs 2000 --jobs 16 > benchmarks/results/coverage.jsonl
    python benchmarks/coverage.py --only "brier" --runs 500

Sizes and shares of changed answers are those of real tasks: GSM8K 1319 with 2, 6 and 12 %, MMLU 14042 with 5 %,
HellaSwag 10042 with 3 %, TruthfulQA 817 with 6 %, a RULER cell of 500 with 4 %, and a limit of 100. A line a case: how
often a 95 % interval held the truth (wanted: 93 to 97 %), or how often a test at 5 % claimed what is not so (wanted:
at most 5 %), with the simulation's own interval. ``naive`` cases show what the usual ways do, and are not wanted.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import special

from lowbit.evaluation import cascade, correlation, hypotheses, screening
from lowbit.evaluation import statistics as st
from lowbit.evaluation.metrics import agreement, calibration, confidence, disagreement, generations, survival
from lowbit.evaluation.metrics.base import Tokens
from lowbit.evaluation.metrics.confidence import Answers
from lowbit.evaluation.metrics.generations import Texts
from lowbit.evaluation.metrics.survival import Divergence
from lowbit.study import advise, laws

TASKS = (
    ("GSM8K", 1319, 0.02), ("GSM8K", 1319, 0.06), ("GSM8K", 1319, 0.12), ("MMLU", 14042, 0.05),
    ("HellaSwag", 10042, 0.03), ("TruthfulQA", 817, 0.06), ("RULER cell", 500, 0.04), ("limit 100", 100, 0.04),
)  # fmt: skip
Rng = np.random.Generator


class Case(NamedTuple):
    """One thing that is simulated: ``draw`` says whether an interval held the truth, or a verdict was false."""

    name: str
    kind: Literal["covers", "errs", "naive"]
    draw: Callable[[Rng], bool]


def holds(interval: st.Interval, truth: float) -> bool:
    return bool(interval.low <= truth <= interval.high)


# -- accuracy: answers that change -------------------------------------------------------------------------------------


def changes(rng: Rng, n: int, flips: float, drop: float) -> np.ndarray:
    """-1, 0 and 1: ``flips`` of the items change, ``drop`` (a share) of accuracy is lost in the mean."""
    return rng.choice([-1.0, 1.0, 0.0], n, p=[(flips + drop) / 2, (flips - drop) / 2, 1 - flips])


def tokens(d: np.ndarray) -> Tokens:
    n = len(d)
    zero = np.zeros(n)
    before = np.where(d == -1, 1, 0)
    columns = dict.fromkeys(("pos", "nll", "nll_ref", "kl", "margin_ref", "top1_p", "entropy_ref"), zero)
    now = np.where(d == 1, 1, 0)
    return Tokens.of(columns | {"doc": np.arange(n), "chunk": np.arange(n), "token": np.ones(n), "top1": now,
                                "top1_ref": before})  # fmt: skip


def of_accuracy() -> Iterator[Case]:
    for task, n, flips in TASKS:
        name = f"{task}, n {n}, {flips:.0%} flips"
        drop = flips / 4

        def covers(rng: Rng, n: int = n, flips: float = flips, drop: float = drop) -> bool:
            return holds(agreement.delta_accuracy(tokens(changes(rng, n, flips, drop))), -drop)

        def errs(rng: Rng, n: int = n, flips: float = flips) -> bool:
            d = changes(rng, n, flips, 0.0)
            return st.mcnemar(int((d < 0).sum()), int((d > 0).sum())) < 0.05

        def same(rng: Rng, n: int = n, flips: float = flips) -> bool:
            margin = min(0.01, flips / 2)
            d = changes(rng, n, flips, margin)
            return st.tost(st.paired_mean(d, np.arange(n)), margin) < 0.05

        yield Case(f"Δ accuracy, {name}", "covers", covers)
        yield Case(f"McNemar, {name}", "errs", errs)
        yield Case(f"TOST at its margin, {name}", "errs", same)


# -- confidence, calibration, disagreement -----------------------------------------------------------------------------


class World(NamedTuple):
    """Two models that answer the same items: ``sharp`` says how over-confident each is."""

    n: int
    clusters: int
    sharp: tuple[float, float]
    noise: float = 0.5

    def draw(self, rng: Rng, n: int | None = None) -> tuple[Answers, Answers]:
        """Items whose clusters differ in how decided they are; the candidate sees noisy logits."""
        cluster = np.arange(n or self.n) % (n or self.clusters)  # items of their own, where many give the truth
        n = len(cluster)
        decided = np.exp(0.3 * rng.normal(size=int(cluster.max()) + 1))[cluster][:, None]
        z = rng.normal(0, 1.5, (n, 4))
        gold = (special.softmax(z * decided, 1).cumsum(1) > rng.random((n, 1))).argmax(1)
        low = z + self.noise * rng.normal(size=z.shape)
        return tuple(
            Answers(special.softmax(s * x, 1), gold, cluster) for s, x in zip(self.sharp, (z, low), strict=True)
        )  # type: ignore[return-value]


WORLDS = {
    "1319 items, calibrated and sharpened": World(1319, 1319, (1.0, 1.0)),
    "817 items, both over-confident": World(817, 817, (1.5, 1.2)),
    "1319 items in 60 clusters": World(1319, 60, (1.5, 1.5)),
    "500 items, one timid, one bold": World(500, 500, (0.6, 1.5)),
    "14042 items in 57 clusters": World(14042, 57, (1.2, 1.4), 0.3),
}


def of_confidence(worlds: dict[str, World] | None = None, large: int = 1_000_000) -> Iterator[Case]:
    for name, world in (worlds or WORLDS).items():
        a, b = world.draw(np.random.default_rng(99), large)
        for metric in confidence.PER_ITEM:
            truth = confidence.shift(metric, a, b).estimate

            def shifts(rng: Rng, world: World = world, metric: str = metric, truth: float = truth) -> bool:
                return holds(confidence.shift(metric, *world.draw(rng)), truth)

            yield Case(f"Δ {metric}, {name}", "covers", shifts)
        alone = [Answers(x.p, x.gold, np.arange(len(x.p)) % 2000) for x in (a, b)]  # a short covariance, one truth
        squared = [calibration.squared_error(x).estimate for x in alone]
        lines = [calibration.calibration_line(x) for x in alone]
        changed = disagreement.disagrees(*alone)
        scores = (disagreement.margin(a.p), disagreement.entropy(a.p))
        ranks = [disagreement.auc(score, changed, alone[0].cluster).estimate for score in scores]
        truths = {
            "Δ squared calibration error": squared[1] - squared[0],
            "squared calibration error": squared[1],
            "Δ calibration slope": lines[1].slope.estimate - lines[0].slope.estimate,
            "Δ calibration intercept": lines[1].intercept.estimate - lines[0].intercept.estimate,
            "calibration slope": lines[1].slope.estimate,
            "share that changed": float(changed.mean()),
            "AUC of the margin": ranks[0],
            "AUC of entropy less margin": ranks[1] - ranks[0],
        }
        measures: dict[str, Callable[[Answers, Answers], st.Interval]] = {
            "Δ squared calibration error": calibration.squared_error_shift,
            "squared calibration error": lambda _, b: calibration.squared_error(b),
            "Δ calibration slope": lambda a, b: calibration.calibration_line_shift(a, b).slope,
            "Δ calibration intercept": lambda a, b: calibration.calibration_line_shift(a, b).intercept,
            "calibration slope": lambda _, b: calibration.calibration_line(b).slope,
            "share that changed": lambda a, b: disagreement.rate(disagreement.disagrees(a, b), a.cluster),
            "AUC of the margin": lambda a, b: disagreement.auc(
                disagreement.margin(a.p), disagreement.disagrees(a, b), a.cluster),
            "AUC of entropy less margin": lambda a, b: disagreement.auc_shift(
                disagreement.margin(a.p), disagreement.entropy(a.p), disagreement.disagrees(a, b), a.cluster),
        }  # fmt: skip
        for what, measure in measures.items():

            def covers(rng: Rng, world: World = world, measure: Any = measure, truth: float = truths[what]) -> bool:
                return holds(measure(*world.draw(rng)), truth)

            yield Case(f"{what}, {name}", "covers", covers)
        level = [calibration.calibration_error(x, debias=False) for x in alone]

        def bootstrap(rng: Rng, world: World = world, truth: float = level[1] - level[0]) -> bool:
            a, b = world.draw(rng)
            members = [np.flatnonzero(a.cluster == c) for c in np.unique(a.cluster)]
            found = []
            for _ in range(100):
                rows = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
                found.append(_ece(b, rows) - _ece(a, rows))
            return bool(np.quantile(found, 0.025) <= truth <= np.quantile(found, 0.975))

        if world.n < 5000:
            yield Case(f"bootstrap of Δ ECE, {name}", "naive", bootstrap)


def _ece(answers: Answers, rows: np.ndarray) -> float:
    return calibration.calibration_error(
        Answers(answers.p[rows], answers.gold[rows], answers.cluster[rows]), debias=False
    )


def of_shares() -> Iterator[Case]:
    """Shares near their ends, alone and in clusters, as reliability bins and cascades have them."""
    for n, clusters, share in ((67, 67, 0.9), (67, 67, 0.5), (500, 500, 0.985), (1319, 60, 0.96), (300, 30, 0.7)):

        def covers(rng: Rng, n: int = n, clusters: int = clusters, share: float = share) -> bool:
            a = 8.0
            p = share if clusters == n else rng.beta(a * share, a * (1 - share), clusters)[np.arange(n) % clusters]
            hit = (rng.random(n) < p).astype(float)
            return holds(disagreement.rate(hit > 0, np.arange(n) % clusters), share)

        yield Case(f"share {share}, n {n} in {clusters}", "covers", covers)

    big = _gated(np.random.default_rng(9), 200_000)

    def chosen(rng: Rng) -> bool:
        found = cascade.choose(_gated(rng, 1319), 0.97, seed=int(rng.integers(1 << 30)))
        return holds(found.reported.outcome, float(np.where(big.margin < found.chosen.margin, 1, big.low).mean()))

    yield Case("agreement of a cascade on the other half, n 1319", "covers", chosen)


def _gated(rng: Rng, n: int) -> cascade.Gated:
    margin = rng.random(n)
    low = (rng.random(n) > 0.5 * (1 - margin) ** 4).astype(np.float64)
    return cascade.Gated(margin, low, np.ones(n), np.arange(n))


# -- texts that diverge ------------------------------------------------------------------------------------------------


def diverging(rng: Rng, prompts: int, seeds: int, scale: float = 1.0) -> Divergence:
    """Hazards differ by prompt; texts are followed for 10 to 60 tokens."""
    hazard = np.repeat(rng.beta(2, 38, prompts) * scale, seeds)
    event = rng.geometric(np.minimum(hazard, 0.99))
    end = rng.integers(10, 61, prompts * seeds)
    return Divergence(np.minimum(event, end), event <= end, np.repeat(np.arange(prompts), seeds))


_HORIZON = 20  # some texts are always followed so far


def of_texts() -> Iterator[Case]:
    hazard = np.random.default_rng(0).beta(2, 38, 400_000)
    at = np.arange(1, _HORIZON + 1)
    alive = np.array([((1 - hazard) ** t).mean() for t in at])
    worse = np.array([((1 - np.minimum(1.4 * hazard, 0.99)) ** t).mean() for t in at])
    for prompts, seeds in ((80, 1), (40, 4), (200, 1)):
        name = f"{prompts} prompts, {seeds} seed(s)"
        for t in (5, 20):

            def share(rng: Rng, prompts: int = prompts, seeds: int = seeds, t: int = t) -> bool:
                steps = survival.curve(diverging(rng, prompts, seeds))
                step = [s for s in steps if s.position <= t][-1]
                return holds(step.share, float(alive[t - 1]))

            yield Case(f"share still alike after {t} tokens, {name}", "covers", share)

        def length(rng: Rng, prompts: int = prompts, seeds: int = seeds) -> bool:
            return holds(survival.agreement_length(diverging(rng, prompts, seeds), _HORIZON), float(alive.sum()))

        def shift(rng: Rng, prompts: int = prompts, seeds: int = seeds) -> bool:
            state = int(rng.integers(1 << 30))
            a, b = (diverging(np.random.default_rng(state), prompts, seeds, s) for s in (1.0, 1.4))
            return holds(survival.agreement_length_shift(a, b, _HORIZON), float(worse.sum() - alive.sum()))

        def repeats(rng: Rng, prompts: int = prompts, seeds: int = seeds) -> bool:
            return holds(generations.level("text_nll", _texts(rng, prompts, seeds)), 2.0)

        yield Case(f"agreement length, {name}", "covers", length)
        yield Case(f"Δ agreement length, {name}", "covers", shift)
        yield Case(f"likelihood of texts, {name}", "covers", repeats)


def _texts(rng: Rng, prompts: int, seeds: int) -> Texts:
    n, steps = prompts * seeds, 12
    prompt = np.repeat(np.arange(prompts, dtype=np.int32), seeds)
    nll = rng.gamma(4, 0.25, prompts)[prompt][:, None] + rng.exponential(1.0, (n, steps))
    nll = nll.astype(np.float32)
    return Texts(prompt, np.tile(np.arange(seeds, dtype=np.int32), prompts), np.ones((n, steps), np.int32),
                 np.ones(n, bool), nll, nll)  # fmt: skip


# -- screening, proxies and verdicts -----------------------------------------------------------------------------------


def of_screening() -> Iterator[Case]:
    for rare in (0.1, 0.3, 0.8):

        def covers(rng: Rng, rare: float = rare) -> bool:
            margin = rng.random(4000)
            flips = rng.random(4000) < rare * (1 - margin) ** 6
            d = np.where(flips, rng.choice([-1.0, -1.0, 1.0], 4000), 0.0)
            found = screening.screen(lambda rows: d[rows], margin, 800, seed=int(rng.integers(1 << 30)))
            return holds(found.interval, float(d.mean()))

        yield Case(f"screening, 800 of 4000 items, {rare / 7:.1%} flips", "covers", covers)

    def race(rng: Rng) -> bool:
        """An equal is never shown to be behind more often than the level."""
        margin = rng.random(2000)
        d = [np.where(rng.random(2000) < 0.3 * (1 - margin) ** 6, rng.choice([-1.0, 1.0], 2000), 0.0) for _ in range(4)]
        level = [values - values.mean() for values in d]
        found = screening.race(
            [(str(i), lambda rows, v=v: v[rows]) for i, v in enumerate(level)], margin, 200, 400,
            seed=int(rng.integers(1 << 30)),
        )  # fmt: skip
        return any(r.confirmed is not None and not holds(r.confirmed, 0.0) for r in found)

    yield Case("race: any confirmed interval of four wrong", "errs", race)


def of_proxy() -> Iterator[Case]:
    for n, r in ((12, -0.9), (12, -0.3), (24, -0.7)):

        def covers(rng: Rng, n: int = n, r: float = r) -> bool:
            x, e = rng.normal(size=(2, n))
            return holds(correlation.proxy(x, {"t": r * x + math.sqrt(1 - r * r) * e})[0].pearson, r)

        yield Case(f"correlation {r} of {n} versions", "covers", covers)


def of_verdicts() -> Iterator[Case]:
    above, within = hypotheses.Hypothesis("a", "", "above"), hypotheses.Hypothesis("w", "", "within", 0.3)

    def mean(rng: Rng, truth: float, n: int = 40) -> st.Interval:
        return st.paired_mean(truth + rng.standard_t(5, n) / math.sqrt(5 / 3), np.arange(n))

    def supported(rng: Rng) -> bool:
        """Four claims, all false by nothing: any of them supported."""
        found = [hypotheses.Measured(above, mean(rng, 0.0)), hypotheses.Measured(above, mean(rng, 0.0)),
                 hypotheses.Measured(within, mean(rng, 0.3)), hypotheses.Measured(within, mean(rng, -0.3))]  # fmt: skip
        return any(j.verdict == "supported" for j in hypotheses.judge(found))

    def contradicted(rng: Rng) -> bool:
        found = [hypotheses.Measured(above, mean(rng, 0.0)), hypotheses.Measured(within, mean(rng, 0.3))]
        rivals = {name: np.exp(0.3 * rng.normal(size=12)) for name in "abcd"}
        worst = hypotheses.worst(hypotheses.extremal(rivals, "a"), "above")
        found.append(hypotheses.Measured(above, worst, 3))
        return any(j.verdict == "contradicted" for j in hypotheses.judge(found))

    def lossy(rng: Rng) -> bool:
        """Ten versions that lose exactly what is allowed: any of them let through."""
        table = []
        for i in range(10):
            loss = st.paired_mean(math.log(1.05) + 0.05 * rng.normal(size=24), np.arange(24))
            table.append(advise.Option(f"v{i}", "", 100 + i, 100 + i, loss))
        return advise.advise(table, advise.Constraint(max_loss=0.05)).choice is not None

    def widths(rng: Rng) -> bool:
        rows = [laws.Relative("W", b, f"m{i}", m + 0.02 * rng.normal()) for b, m in ((8, 0.0), (4, 0.05), (3, 0.05))
                for i in range(8)]  # fmt: skip
        return laws.recommend(rows, [0.05])[0].bits in (3, 4)

    def scales(rng: Rng) -> bool:
        a = laws.Point("small", 1, "16", 100, rng.normal(2, 0.1), 0.1)
        b = laws.Point("large", 4, "4", 100, rng.normal(2, 0.1), 0.1)
        return laws.scale_or_precision([a, b])[0].verdict != "undecided"

    yield Case("hypotheses: any of four false claims supported", "errs", supported)
    yield Case("hypotheses: any of three true claims contradicted", "errs", contradicted)
    yield Case("advice: any of ten versions at the limit let through", "errs", lossy)
    yield Case("bit widths: a mean loss of the budget itself recommended", "errs", widths)
    yield Case("scale or precision: equals told apart", "errs", scales)


def cases() -> Iterator[Case]:
    for group in (of_accuracy, of_confidence, of_shares, of_texts, of_screening, of_proxy, of_verdicts):
        yield from group()


def simulate(case: Case, runs: int) -> st.Interval:
    """How often ``draw`` says yes, over seeded runs."""
    seed = zlib.crc32(case.name.encode())
    return st.clopper_pearson(sum(case.draw(np.random.default_rng([seed, i])) for i in range(runs)), runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time, a process each")
    a = parser.parse_args()
    wanted.extend(case for case in cases() if a.only in case.name)
    # forked, so that workers have the cases; one a task, since some take a hundred times as long
    with multiprocessing.get_context("fork").Pool(a.jobs) as pool:
        for case, found in zip(wanted, pool.imap(_simulate, [(i, a.runs) for i in range(len(wanted))]), strict=True):
            show(case, found, a.runs)


wanted: list[Case] = []


def _simulate(task: tuple[int, int]) -> st.Interval:
    return simulate(wanted[task[0]], task[1])


def show(case: Case, found: st.Interval, runs: int) -> None:
    """The line of a case."""
    fine = {"covers": found.low <= 0.97 and found.high >= 0.93, "errs": found.low <= 0.05, "naive": True}[case.kind]
    print(json.dumps({"case": case.name, "kind": case.kind, "share": round(found.estimate, 4), "runs": runs,
                      "low": round(found.low, 4), "high": round(found.high, 4), "as_wanted": fine},
                     ensure_ascii=False), flush=True)  # fmt: skip
    if not fine:
        print(f"NOT AS WANTED: {case.name}: {found.estimate:.3f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
