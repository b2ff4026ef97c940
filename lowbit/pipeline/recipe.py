"""Recipe: what to do to a model, as data. One line (``gptq:int4-g64,damp=0.02``) or a TOML file.

[[step]]
method = "gptq"
format = "int4-g64"
options = { act_order = true }
[[override]]                       # the first that matches a site wins
sites = "*.down_proj"
format = "int8-row"
[[override]]
sites = "model.layers.0.*"
keep = "the first block is fragile"
[calibration]
text = "pydoc"
samples = 32
length = 512
"""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowbit import digest
from lowbit.errors import RecipeError, nearest
from lowbit.formats.format import Format
from lowbit.formats.presets import preset
from lowbit.methods.base import Encoder, method

Scalar = bool | int | Annotated[float, Field(allow_inf_nan=False)] | str


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Step(_Data):
    """A method applied to every site, and the format of its codes."""

    method: str
    format: str
    options: dict[str, Scalar] = {}


class Override(_Data):
    """Another treatment for the sites whose names match a pattern: other settings, or ``keep`` with the reason."""

    sites: str
    method: str | None = None
    format: str | None = None
    options: dict[str, Scalar] = {}
    keep: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Override:
        if (self.keep is not None) == bool(self.method or self.format or self.options):
            raise ValueError("an override either keeps its sites, with a reason, or changes method, format or options")
        if self.keep is not None and not self.keep.strip():
            raise ValueError("keep is the reason for keeping the sites, in words")
        return self

    def matches(self, site: str) -> bool:
        return fnmatch.fnmatchcase(site, self.sites)


class Calibration(_Data):
    """Which text the statistics come from, and how the walk propagates."""

    text: str = "pydoc"
    samples: int = Field(default=32, ge=1)
    length: int = Field(default=512, ge=8)
    seed: int | None = 0
    batch: int = Field(default=8, ge=1)
    propagate: Literal["quantized", "original"] = "quantized"


class Treatment(NamedTuple):
    """What happens to one site."""

    method: str
    encoder: Encoder
    format: Format


class Recipe(_Data):
    """The whole recipe; parsed values are checked, so that a plan can rely on them."""

    step: list[Step] = Field(min_length=1, max_length=1)
    override: list[Override] = []
    calibration: Calibration = Calibration()

    def treatment(self, site: str) -> Treatment | str:
        """How a site is treated, or the reason for keeping it as it is."""
        return self._apply(next((rule for rule in self.override if rule.matches(site)), None))

    def _apply(self, rule: Override | None) -> Treatment | str:
        step = self.step[0]
        if rule is None:
            return Treatment(step.method, method(step.method, step.options), preset(step.format))
        if rule.keep is not None:
            return rule.keep
        name = rule.method or step.method
        options = rule.options if rule.method else {**step.options, **rule.options}
        return Treatment(name, method(name, options), preset(rule.format or step.format))

    def check(self, sites: Iterable[str]) -> None:
        """Raises RecipeError for an override that decides about no site of the model."""
        known = list(sites)
        free = set(known)
        for rule in self.override:
            matched = {site for site in known if rule.matches(site)}
            if not matched:
                leaves = {site.rpartition(".")[2] for site in known}
                raise RecipeError(
                    f"the override for {rule.sites!r} matches no site", why="it would change nothing in silence",
                    fix=f"patterns over names such as {known[0]!r} (leaves: {', '.join(sorted(leaves))})",
                )  # fmt: skip
            if not matched & free:
                raise RecipeError(
                    f"the override for {rule.sites!r} comes after others that take all its sites",
                    why="the first match wins, so it would change nothing in silence", fix="put it before them",
                )  # fmt: skip
            free -= matched

    @property
    def calibrated(self) -> bool:
        """Whether any of its treatments needs statistics, and so calibration text."""
        treatments = [self.treatment("")] + [self.treatment(rule.sites) for rule in self.override]
        return any(t.encoder.needs for t in treatments if not isinstance(t, str))

    @property
    def line(self) -> str:
        """The one-line spelling of the step, for tables."""
        step = self.step[0]
        options = "".join(f",{key}={_spell(value)}" for key, value in sorted(step.options.items()))
        return f"{step.method}:{step.format}{options}" + (f"+{len(self.override)}" if self.override else "")

    @property
    def digest(self) -> str:
        return digest.of_value(self.model_dump())


def parse(text: str) -> Recipe:
    """A recipe from its one-line spelling, or from the TOML file of that name.

    Raises RecipeError that names the nearest method, format or option.
    """
    if text.endswith(".toml"):
        return _from_toml(Path(text))
    head, *pairs = text.split(",")
    name, colon, fmt = head.partition(":")
    if not colon:
        raise RecipeError(f"{text!r} is not METHOD:FORMAT", fix="gptq:int4-g64, rtn:nf4, or a .toml file")
    options: dict[str, Scalar] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"{pair!r} is not OPTION=VALUE", where=text, fix="gptq:int4-g64,damp=0.02")
        options[key] = _scalar(value)
    return _checked({"step": [{"method": name, "format": fmt, "options": options}]}, text)


def with_calibration(recipe: Recipe, **changes: Any) -> Recipe:
    """The same recipe with other calibration settings (those that are not None). Raises RecipeError."""
    given = {key: value for key, value in changes.items() if value is not None}
    return _checked({**recipe.model_dump(), "calibration": {**recipe.calibration.model_dump(), **given}}, "calibration")


def _from_toml(path: Path) -> Recipe:
    try:
        return _checked(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        raise RecipeError("does not exist", where=str(path)) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"is not TOML: {error}", where=str(path)) from error


def _checked(value: dict[str, Any], where: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        found = error.errors()  # a misspelt field explains the missing one
        first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
        field = ".".join(map(str, first["loc"]))
        known = {*Recipe.model_fields, *Step.model_fields, *Override.model_fields, *Calibration.model_fields}
        fix = nearest(str(first["loc"][-1]), known) if first["type"] == "extra_forbidden" else ""
        raise RecipeError(f"{field}: {first['msg']}", where=where, fix=fix) from error
    for rule in (None, *recipe.override):
        recipe._apply(rule)  # methods, options and formats exist
    return recipe


def _scalar(text: str) -> Scalar:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _spell(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
