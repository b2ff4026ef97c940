"""Sharing a budget of bytes among entropy-coded linears: every linear gets a rate of its own.

A bit more for all weights of a linear divides its loss by four. So the best rates are those at which the next bit saves
the same everywhere: where every weight costs the same predicted KL (reverse water-filling). Losses at a few rates come
from :mod:`lowbit.pipeline.sensitivity`. The outcome is an ordinary recipe whose overrides name rates; encoders hit each
of them to 0.05 % from below, and what headers take is counted, so that the files hit the budget.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from lowbit import digest
from lowbit.errors import RecipeError
from lowbit.formats.ec import GAINS, HIGHEST, LOWEST, STEPS, Entropy
from lowbit.formats.pack import row_bytes
from lowbit.formats.presets import preset
from lowbit.formats.spec import Leaf, Spec
from lowbit.models.source import Source
from lowbit.pipeline.allocate import Allocation, kept_bytes, overridden, rule_of, site_bytes
from lowbit.pipeline.coverage import audit
from lowbit.pipeline.recipe import Recipe, Treatment
from lowbit.pipeline.sensitivity import Sensitivity, SiteLoss

FORMATS = ("ec2", "ec3", "ec4")
"""The rates that losses are measured at where none are named."""
_ANY = "ec4"  # stands for the rates to come where only shapes matter
_ROUNDS = 10
_SHARD = 256  # bytes of a shard beside what its sites and tensors are told of


def waits_for_budget(recipe: Recipe) -> bool:
    """Whether the recipe's format is ``ec``, whose rate is what a budget leaves."""
    return recipe.encoder is not None and recipe.encoder.format == "ec"


def measurable(recipe: Recipe) -> Recipe:
    """The recipe with a rate, for what needs one before rates are known."""
    step = [*recipe.step[:-1], recipe.step[-1].model_copy(update={"format": _ANY})]
    return recipe.model_copy(update={"step": step}) if waits_for_budget(recipe) else recipe


def share(source: Source, recipe: Recipe, sensitivity: Sensitivity, budget: int) -> Allocation:
    """Rates for every linear of a recipe with format ``ec``, so that all files together take ``budget`` bytes.

    Overrides that name a format, or keep sites in 16 bit, are kept and counted. Raises RecipeError, with the smallest
    size that is possible, when the budget cannot be met, or when the sensitivity holds no losses at rates;
    CalibrationError when it is another model's. Loads no weights.
    """
    sensitivity.check(source)
    coverage = audit(source, measurable(recipe))
    known = {row.name: row for row in sensitivity.sites}
    fixed = kept_bytes(source, coverage) + _SHARD * (len(source.blocks) + 1)
    curves: dict[str, _Curve] = {}
    for name, (site, treatment) in coverage.treated.items():
        rule = rule_of(recipe, name)
        if rule is not None and rule.format not in (None, "ec"):
            fixed += site_bytes(name, site.shape, treatment.format)
        elif name in known:
            curves[name] = _Curve.of(known[name])
            fixed += _told(name, site.shape, 2 * coverage.parameters, treatment, _rotates(recipe))
        else:
            raise RecipeError(
                "nothing is known about its sensitivity", where=name, fix="an override that names its format"
            )
    if not curves:
        raise RecipeError("no linear is free", where=recipe.line, why="overrides name the format of each")
    rates = _filled(curves, budget - fixed, fixed)
    formats = {name: Entropy.of(rate).name for name, rate in rates.items()}
    nbytes = fixed + sum(preset(fmt).nbytes(curves[name].shape) for name, fmt in formats.items())
    spelled = overridden(recipe, formats, [*coverage.treated, *(kept.name for kept in coverage.kept)])
    loss = math.fsum(2 ** curves[name].log2_loss(rate) for name, rate in rates.items())
    return Allocation(spelled, formats, budget, nbytes, loss, 0.0, min(rates.values()) >= HIGHEST)


@dataclass(frozen=True)
class _Curve:
    """A linear's loss over its rate: straight lines in log2 between the rates measured, and beyond them."""

    shape: tuple[int, int]
    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, row: SiteLoss) -> _Curve:
        rates = {fmt.bits: row.loss[name] for name in row.loss if isinstance(fmt := preset(name), Entropy) and fmt.bits}
        if len(rates) < 2:
            raise RecipeError(
                "the sensitivity has losses at fewer than two rates", where=row.name,
                fix=f"lowbit sensitivity --formats {','.join(FORMATS)}",
            )  # fmt: skip
        tiny = 1e-30  # an expert that no token reached
        return cls(row.shape, tuple((bits, math.log2(max(rates[bits], tiny))) for bits in sorted(rates)))

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    def log2_loss(self, rate: float) -> float:
        inner = [k for k in range(1, len(self.points) - 1) if self.points[k][0] <= rate]
        (x0, y0), (x1, y1) = self.points[k := inner[-1] if inner else 0], self.points[k + 1]
        slope = min(max((y1 - y0) / (x1 - x0), -3.0), -1.0)  # noise must not turn a curve around
        return y0 + slope * (rate - x0)


def _filled(curves: Mapping[str, _Curve], budget: int, fixed: int) -> dict[str, float]:
    """Rates at which every weight costs the same, within the limits of a rate, in ``budget`` bytes or just below."""
    weights = sum(curve.weights for curve in curves.values())
    least = sum(int(LOWEST * curve.weights / 8) + 1 for curve in curves.values())
    if budget < least:
        raise RecipeError(
            f"a budget of {budget + fixed:,} bytes cannot be met, the smallest is {least + fixed:,}",
            fix="a larger budget, or fewer linears in 16 bit",
        )
    mean = min(max(8 * budget / weights, LOWEST), HIGHEST)
    rates = dict.fromkeys(curves, mean)
    for _ in range(_ROUNDS):
        # what a linear would cost at no bits at all, if every bit divided its loss by four as it does around its rate
        height = {
            name: (curve.log2_loss(rates[name]) + 2 * rates[name] - math.log2(curve.weights)) / 2
            for name, curve in curves.items()
        }
        rates = _levelled(height, curves, budget)
    return rates


def _levelled(height: Mapping[str, float], curves: Mapping[str, _Curve], budget: int) -> dict[str, float]:
    """``height - level`` within limits, for the lowest level that fits; in steps of 0.0001 bits, downwards."""
    low, high = min(height.values()) - HIGHEST - 1, max(height.values()) - LOWEST
    for _ in range(40):
        level = (low + high) / 2
        if _size(height, level, curves) > budget:
            low = level
        else:
            high = level
    return {name: _rate(h - high) for name, h in height.items()}


def _size(height: Mapping[str, float], level: float, curves: Mapping[str, _Curve]) -> int:
    return sum(int(_rate(h - level) * curves[name].weights / 8) for name, h in height.items())


def _rate(bits: float) -> float:
    return min(max(math.floor(bits * 1e4) / 1e4, LOWEST), HIGHEST)


def _rotates(recipe: Recipe) -> bool:
    """Whether inputs are rotated, which is stored with every linear. Raises RecipeError for other ways in."""
    if any(step.method == "qllm" for step in recipe.step):
        raise RecipeError("what qllm adds to a linear is not known beforehand", where=recipe.line, fix="a rate: ec3")
    return any(step.method == "rotate" for step in recipe.step)


def _told(name: str, shape: tuple[int, int], whole: int, treatment: Treatment, rotated: bool) -> int:
    """The most that a linear takes beside its codes: its entries in the header of its shard, and a rotation's signs.

    ``whole`` is the largest position that these entries may have to spell.
    """
    rows, columns = shape
    static = (("base", -99.9999), ("gain_octaves", 9.9999), ("step_octaves", 9.9999))
    leaves = [Leaf("stream", "uint8", (whole,))]
    if treatment.encoder.needs:  # without statistics all columns have one step
        leaves.append(Leaf("steps", "uint8", (1, row_bytes(columns, STEPS)), columns, STEPS))
    if getattr(treatment.encoder, "fisher", False):
        leaves.append(Leaf("gains", "uint8", (1, row_bytes(rows, GAINS)), rows, GAINS))
    spec = Spec("Coded", shape, static, tuple(leaves), ())
    signs = 0
    if rotated:
        signs = row_bytes(columns, 2)
        spec = Spec("Rotated", shape, (("size", columns),), (Leaf("signs", "uint8", (1, signs), columns, 2),),
                    (("inner", spec),))  # fmt: skip
    told = json.dumps(f'"{name}":{digest.canonical(spec.to_json())},')
    entries = (
        f'"{name}.weight.{path}":{{"dtype":"U8","shape":{list(leaf.shape)},"data_offsets":[{whole},{whole}]}},'
        for path, leaf in spec.paths().items()
    )
    return signs + len(told) + sum(map(len, entries))
