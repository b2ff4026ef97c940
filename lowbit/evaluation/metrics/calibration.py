"""Calibration: whether a model is right as often as it is sure.

Confidence is held against *correctness*, never against a label's index or the recall of a class, as code that is
published with arXiv:2405.00632 does.

The binned L1 error (ECE) has a bias that grows with the noise in its bins, so resampling it covers badly: 56 to 88 %
instead of 95 % beside a calibrated reference (benchmarks/coverage.py). It is printed as a level; the interval is that
of the squared error, which has an exact debiasing (Kumar et al. 2019, arXiv:1909.10155).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, special

from lowbit.errors import EvidenceError
from lowbit.evaluation.metrics.confidence import Answers
from lowbit.evaluation.metrics.influence import interval, share
from lowbit.evaluation.statistics import Interval

Bins = Literal["mass", "width"]
BINS = 15
_LEAST = 1e-6  # confidences closer to 0 and 1 are cut here: a logit of 14 is sure enough


class ReliabilityBin(NamedTuple):
    """Items of like confidence: how sure the model is, and how often right."""

    confidence: float
    accuracy: Interval


def reliability(
    answers: Answers, bins: int = BINS, kind: Bins = "mass", confidence: float = 0.95
) -> list[ReliabilityBin]:
    """Accuracy against mean confidence; the diagonal is perfect calibration.

    Intervals are Beta quantiles with a uniform prior at the effective number of items, n over the design effect of the
    clusters (Korn & Graubard 1998), so that they stay within [0, 1] and cover in small bins.
    """
    member = _member(answers.confidence, bins, kind)
    found = []
    for k in np.unique(member):
        inside = member == k
        mean = float(answers.confidence[inside].mean())
        found.append(ReliabilityBin(mean, share(answers.correct[inside], answers.cluster[inside], confidence)))
    return found


def calibration_error(answers: Answers, bins: int = BINS, kind: Bins = "mass", *, debias: bool = True) -> float:
    """ECE: mean over items of |accuracy - confidence| of their bin (Naeini et al. 2015); a level without interval.

    ``debias`` takes off what the noise within a bin adds by itself, E|X| - |mean| for a normal X of its clustered
    error; at an error of 0 a part of that bias, some 60 %, remains.
    """
    binned = _binned(answers, bins, kind)
    error = np.abs(binned.gap)
    if debias:
        sd = np.sqrt(np.maximum(np.diagonal(binned.covariance), np.finfo(np.float64).tiny))
        z = binned.gap / sd
        folded = sd * math.sqrt(2 / math.pi) * np.exp(-z * z / 2) + binned.gap * special.erf(z / math.sqrt(2))
        error = error - (folded - error)
    return float(binned.weight @ error)


def squared_error(answers: Answers, bins: int = BINS, kind: Bins = "mass", confidence: float = 0.95) -> Interval:
    """Mean over items of the squared gap of their bin, debiased: 0 in the mean for a calibrated model, so it may be
    negative. Its root is the RMS calibration error."""
    binned = _binned(answers, bins, kind)
    found = _quadratic([(1.0, binned)], confidence)
    covariance, pull = binned.covariance, binned.weight * binned.gap
    scaled = binned.weight[:, None] * covariance
    noise, t = float(np.sum(scaled * scaled.T)), float(special.stdtrit(found.clusters - 1, (1 + confidence) / 2))
    # the variance grows with the error itself, 2 noise + 4 rate error: the ends are where the estimate is t errors off;
    # the rate is the variance of the direction that the gaps take, which few clusters push together
    rate = float(pull @ covariance @ pull) / max(float(pull @ binned.gap), np.finfo(np.float64).tiny)
    middle = found.estimate + 2 * rate * t * t
    half = math.sqrt(max(middle**2 - found.estimate**2 + 2 * noise * t * t, 0.0))
    return found._replace(low=middle - half, high=middle + half)


def squared_error_shift(
    reference: Answers, candidate: Answers, bins: int = BINS, kind: Bins = "mass", confidence: float = 0.95
) -> Interval:
    """Paired difference of ``squared_error``, candidate less reference; positive is worse.

    The estimand is that of the bins at hand; each model has its own.
    """
    reference.require_paired(candidate)
    return _quadratic([(-1.0, _binned(reference, bins, kind)), (1.0, _binned(candidate, bins, kind))], confidence)


class Line(NamedTuple):
    """Correctness as a logistic function of the logit of confidence: 1 and 0 for a calibrated model (Cox 1958)."""

    slope: Interval
    """Below 1: too extreme; sharpening by a temperature of 0.5 gives 0.5."""
    intercept: Interval
    """Below 0: too sure of itself even where it is undecided."""


def calibration_line(answers: Answers, confidence: float = 0.95) -> Line:
    """Slope and intercept with cluster-robust (sandwich) errors. Raises EvidenceError where no line exists."""
    return Line(*_line([(1.0, answers)], confidence))


def calibration_line_shift(reference: Answers, candidate: Answers, confidence: float = 0.95) -> Line:
    """Paired differences of slope and intercept, candidate less reference."""
    reference.require_paired(candidate)
    return Line(*_line([(-1.0, reference), (1.0, candidate)], confidence))


class _Binned(NamedTuple):
    n: int
    weight: Float[np.ndarray, " b"]
    """Share of the items."""
    gap: Float[np.ndarray, " b"]
    """Accuracy less confidence."""
    residual: Float[np.ndarray, "b g"]
    """What each cluster adds to the error of each gap."""

    @property
    def covariance(self) -> Float[np.ndarray, "b b"]:
        return _covariance(self.residual)


def _binned(answers: Answers, bins: int, kind: Bins) -> _Binned:
    _, member = np.unique(_member(answers.confidence, bins, kind), return_inverse=True)
    _, cluster = np.unique(answers.cluster, return_inverse=True)
    k, g = int(member.max()) + 1, int(cluster.max()) + 1
    count = np.bincount(member, minlength=k)
    difference = answers.correct - answers.confidence
    gap = np.bincount(member, difference, k) / count
    residual = (difference - gap[member]) / count[member]
    sums = np.bincount(member * g + cluster, residual, k * g).reshape(k, g)
    return _Binned(len(member), count / count.sum(), gap, sums)


def _member(value: Float[np.ndarray, " n"], bins: int, kind: Bins) -> Int[np.ndarray, " n"]:
    """Bin of every item; equal values share one, so that equal-mass bins may differ in mass."""
    shares = np.arange(1, bins) / bins
    member: Int[np.ndarray, " n"] = np.searchsorted(
        shares if kind == "width" else np.quantile(value, shares), value, side="right"
    )
    return member


def _covariance(residual: Float[np.ndarray, "b g"]) -> Float[np.ndarray, "b b"]:
    g = residual.shape[1]
    if g < 2:
        raise EvidenceError(f"{g} cluster(s)", where="calibration", why="no error can be told from one cluster")
    covariance: Float[np.ndarray, "b b"] = g / (g - 1) * residual @ residual.T
    return covariance


def _quadratic(terms: list[tuple[float, _Binned]], level: float) -> Interval:
    """Σ sign · Σ_b weight · gap² with its noise taken off, and the error of that.

    For gaps d of covariance S and D = diag(sign · weight): d'Dd overshoots by tr(DS), and for normal d its variance is
    4 μ'DSDμ + 2 tr(DSDS), where d'DSDd overshoots the first term by tr(DSDS).
    """
    scale = np.concatenate([sign * b.weight for sign, b in terms])
    gap = np.concatenate([b.gap for _, b in terms])
    residual = np.concatenate([b.residual for _, b in terms])
    covariance = _covariance(residual)
    scaled = scale[:, None] * covariance
    noise = float(np.sum(scaled * scaled.T))
    slope = float((scale * gap) @ covariance @ (scale * gap))
    se = math.sqrt(2 * noise + 4 * max(slope - noise, 0.0))
    estimate = float(scale @ np.square(gap) - np.trace(scaled))
    clusters = residual.shape[1]
    half = float(special.stdtrit(clusters - 1, (1 + level) / 2)) * se
    return Interval(
        estimate, estimate - half, estimate + half, se, terms[0][1].n, clusters, "debiased squares, clustered"
    )


def _line(terms: list[tuple[float, Answers]], level: float) -> tuple[Interval, Interval]:
    """Σ sign · (slope, intercept), with errors from the items' influences summed by cluster."""
    fitted = [(sign, *_fit(a)) for sign, a in terms]
    estimate = np.sum([sign * line for sign, line, _ in fitted], axis=0)
    influence = np.sum([sign * each for sign, _, each in fitted], axis=0)
    slope, intercept = (
        interval(float(estimate[i]), influence[:, i], terms[0][1].cluster, level, "logistic") for i in (1, 0)
    )
    return slope, intercept


def _fit(answers: Answers) -> tuple[Float[np.ndarray, " 2"], Float[np.ndarray, "n 2"]]:
    """Intercept and slope of the logistic regression, and the influence of every item on them."""
    y = answers.correct
    x = special.logit(np.clip(answers.confidence, _LEAST, 1 - _LEAST))
    # sorted by x, right after wrong or wrong after right throughout: one line separates them, and no slope is largest
    separated = not (x[y == 1].min(initial=np.inf) < x[y == 0].max(initial=-np.inf)) or not (
        x[y == 0].min() < x[y == 1].max()
    )
    if separated:
        raise EvidenceError(
            "right and wrong answers are separated by confidence, or of one kind alone", where="calibration line",
            why="the steeper the line, the better it fits: there is no slope", fix="more items",
        )  # fmt: skip
    rows = np.stack([np.ones_like(x), x], axis=1)

    def loss(line: Float[np.ndarray, " 2"]) -> float:
        z = rows @ line
        return float(np.sum(np.logaddexp(0, z) - y * z))

    def gradient(line: Float[np.ndarray, " 2"]) -> Float[np.ndarray, " 2"]:
        slope: Float[np.ndarray, " 2"] = rows.T @ (special.expit(rows @ line) - y)
        return slope

    def curvature(line: Float[np.ndarray, " 2"]) -> Float[np.ndarray, "2 2"]:
        p = special.expit(rows @ line)
        bent: Float[np.ndarray, "2 2"] = rows.T @ (rows * (p * (1 - p))[:, None])
        return bent

    found = optimize.minimize(loss, np.array([0.0, 1.0]), jac=gradient, hess=curvature, method="trust-exact")
    line = found.x
    scores = rows * (y - special.expit(rows @ line))[:, None]
    return line, scores @ np.linalg.inv(curvature(line))
