"""What one pass over the original model can serve: an activation card in the place of a walk's own passes."""

from __future__ import annotations

from collections.abc import Iterable

from lowbit.calibration.cards import Card
from lowbit.calibration.stats import Stat
from lowbit.errors import CalibrationError, RecipeError
from lowbit.models.source import Source
from lowbit.pipeline.coverage import Coverage
from lowbit.pipeline.encode import ranges_needed
from lowbit.pipeline.rate import asks_fisher
from lowbit.pipeline.recipe import Recipe, Treatment


def shareable(recipe: Recipe) -> frozenset[type[Stat]]:
    """The statistics of a card that gives a recipe the codes of its own walk; empty where none does.

    Such recipes are encoders alone that propagate the original: then what a block reads does not depend on them.
    """
    alone = not recipe.transforms and recipe.tuner is None and not asks_fisher(recipe.treatments)
    return statistics(recipe.treatments) if alone and recipe.calibration.propagate == "original" else frozenset()


def statistics(treatments: Iterable[Treatment]) -> frozenset[type[Stat]]:
    """All that encoders and static ranges of inputs are calibrated by."""
    return frozenset(kind for t in treatments for kind in t.encoder.needs | ranges_needed(t))


def check_card(card: Card, source: Source, recipe: Recipe, coverage: Coverage) -> None:
    """Raises CalibrationError for a card of another model, RecipeError where statistics alone do not suffice."""
    card.check(source)
    if recipe.transforms or recipe.tuner is not None:
        raise RecipeError(
            "a card cannot calibrate transforms and tuners", where=recipe.line,
            why="it holds sums over the inputs of the model as it is, and these run blocks",
            fix="an encoder alone with the card, or calibration text",
        )  # fmt: skip
    treatments = [treatment for _, treatment in coverage.treated.values()]
    if asks_fisher(treatments):
        raise RecipeError(
            "a card holds no Fisher information", where=recipe.line, why="it takes gradients of the whole model",
            fix="fisher=false, or calibration text",
        )  # fmt: skip
    if missing := sorted(kind.__name__ for kind in statistics(treatments) - card.kinds):
        raise CalibrationError(
            f"holds no {' and no '.join(missing)}", where=str(card.path), fix="a card made with --gram and ranges",
        )  # fmt: skip
