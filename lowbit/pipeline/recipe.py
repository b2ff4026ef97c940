"""Recipe: what to do to a model, as data. One line or a TOML file.

    smoothquant,alpha=0.8+gptq:int4-g64,damp=0.02+a:int8-token+kv:int4-head

Transforms come first, then at most one encoder or tuner with the format of its codes, then how the inputs of linears
(``a:``) and the KV cache (``kv:KEY[:VALUE]``) are rounded. ``until:transforms`` stops before the encoder. In TOML:

[[step]]
method = "smoothquant"
options = { alpha = 0.8 }
[[step]]
method = "gptq"
format = "int4-g64"
[activations]
format = "int8-token"
[kv]
key = "int4-head"
value = "int4-head"
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
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowbit import digest
from lowbit.errors import RecipeError, nearest
from lowbit.formats.activation import ActivationFormat, activation
from lowbit.formats.ec import Entropy
from lowbit.formats.format import Format
from lowbit.formats.heads import head_format
from lowbit.formats.presets import preset
from lowbit.methods.base import BlockTuner, Encoder, Transform, kind, method, names

NO_ENCODER = "the recipe has no encoder: 16 bit"

Scalar = bool | int | Annotated[float, Field(allow_inf_nan=False)] | str


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Step(_Data):
    """A method applied to every site or block, and the format of its codes (none for a transform)."""

    method: str
    format: str | None = None
    options: dict[str, Scalar] = {}


class Activations(_Data):
    """How the inputs of every quantized linear are rounded."""

    format: str


class KV(_Data):
    """How the KV cache is kept; the first ``sink`` and the last ``window`` tokens stay in 16 bit."""

    key: str
    value: str
    sink: int = Field(default=0, ge=0)
    window: int = Field(default=0, ge=0)


class Override(_Data):
    """Another treatment for the sites whose names match a pattern: other settings, or ``keep`` with the reason.

    ``activations = "none"`` leaves the inputs of its sites as they are.
    """

    sites: str
    method: str | None = None
    format: str | None = None
    activations: str | None = None
    options: dict[str, Scalar] = {}
    keep: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Override:
        if (self.keep is not None) == bool(self.method or self.format or self.options or self.activations):
            raise ValueError(
                "an override either keeps its sites, with a reason, or changes method, format, options or activations"
            )
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
    """(or a tuner, which has the same needs and is called with a whole block)"""
    format: Format
    activations: ActivationFormat | None = None


class Recipe(_Data):
    """The whole recipe; parsed values are checked, so that a plan can rely on them."""

    step: list[Step] = []
    override: list[Override] = []
    activations: Activations | None = None
    kv: KV | None = None
    until: Literal["transforms", "codes"] = "codes"
    """``transforms``: stop before the encoder, to see what the transforms alone change (nothing, they promise)."""
    calibration: Calibration = Calibration()

    @property
    def transforms(self) -> list[tuple[str, Transform]]:
        """The steps before the encoder, with their names."""
        return [(s.method, method(s.method, s.options)) for s in self.step if kind(s.method) == "transform"]

    @property
    def encoder(self) -> Step | None:
        """The step that makes codes; None when weights stay in 16 bit."""
        return self.step[-1] if self.step and kind(self.step[-1].method) != "transform" else None

    @property
    def tuner(self) -> BlockTuner | None:
        """The encoder, when it works on whole blocks."""
        step = self.encoder
        return method(step.method, step.options) if step and kind(step.method) == "tuner" else None

    def treatment(self, site: str) -> Treatment | str:
        """How a site is treated, or the reason for keeping it as it is."""
        return self._apply(next((rule for rule in self.override if rule.matches(site)), None))

    def _apply(self, rule: Override | None) -> Treatment | str:
        if rule is not None and rule.keep is not None:
            return rule.keep
        step = self.encoder
        if step is None:
            return NO_ENCODER
        activations = self.activations.format if self.activations else None
        name, fmt, options = step.method, step.format, step.options
        if rule is not None:
            name, fmt = rule.method or name, rule.format or fmt
            options = rule.options if rule.method else {**options, **rule.options}
            activations = rule.activations or activations
        assert fmt is not None  # see _checked
        rounded = activation(activations) if activations not in (None, "none") else None
        encoder, coded = method(name, options), preset(fmt)
        _takes_any_rate(name, encoder, coded)
        return Treatment(name, encoder, coded, rounded)

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
    def treatments(self) -> list[Treatment]:
        """Every way in which it may treat a site, whatever model it is for."""
        found = [self._apply(rule) for rule in (None, *self.override)]
        return [t for t in found if not isinstance(t, str)]

    @property
    def calibrated(self) -> bool:
        """Whether any of its steps needs statistics, and so calibration text."""
        static = any(t.activations and t.activations.static for t in self.treatments)
        # transforms look for edges on a sample of hidden states even when they need no statistics
        return static or bool(self.transforms) or any(t.encoder.needs for t in self.treatments)

    @property
    def line(self) -> str:
        """The one-line spelling, for tables; overrides are only counted."""
        parts = [
            s.method + (f":{s.format}" if s.format else "")
            + "".join(f",{key}={_spell(value)}" for key, value in sorted(s.options.items()))
            for s in self.step
        ]  # fmt: skip
        if self.activations:
            parts.append(f"a:{self.activations.format}")
        if self.until != "codes":
            parts.append(f"until:{self.until}")
        if self.kv:
            same = self.kv.key == self.kv.value
            parts.append(f"kv:{self.kv.key}" + ("" if same else f":{self.kv.value}"))
            parts[-1] += "".join(f",{k}={v}" for k in ("sink", "window") if (v := getattr(self.kv, k)))
        return "+".join(parts) + (f"+{len(self.override)}" if self.override else "")

    @property
    def digest(self) -> str:
        return digest.of_value(self.model_dump())


def parse(text: str) -> Recipe:
    """A recipe from its one-line spelling, or from the TOML file of that name.

    Raises RecipeError that names the nearest method, format or option.
    """
    if text.endswith(".toml"):
        return _from_toml(Path(text))
    steps: list[dict[str, Any]] = []
    value: dict[str, Any] = {"step": steps}
    for part in re.split(r"\+(?=[a-z])", text):
        head, *pairs = part.split(",")
        name, colon, fmt = head.partition(":")
        options = _options(pairs, text)
        if name in ("a", "kv", "until") and not (colon and fmt):
            raise RecipeError(f"{part!r} names nothing", where=text, fix="a:int8-token, kv:int4-head, until:transforms")
        if name == "until":
            value["until"] = fmt
        elif name == "a":
            value["activations"] = {"format": fmt, **options}
        elif name == "kv":
            key, _, val = fmt.partition(":")
            value["kv"] = {"key": key, "value": val or key, **options}
        elif not colon and name not in names():
            raise RecipeError(
                f"{part!r} is not METHOD:FORMAT, and no transform",
                where=text,
                fix=f"gptq:int4-g64; {nearest(name, names())}",
            )
        else:
            steps.append({"method": name, "format": fmt or None, "options": options})
    return _checked(value, text)


def _options(pairs: list[str], where: str) -> dict[str, Scalar]:
    options: dict[str, Scalar] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"{pair!r} is not OPTION=VALUE", where=where, fix="gptq:int4-g64,damp=0.02")
        options[key] = _scalar(value)
    return options


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
        models = (Recipe, Step, Override, Activations, KV, Calibration)
        known = {name for model in models for name in model.model_fields}
        fix = nearest(str(first["loc"][-1]), known) if first["type"] == "extra_forbidden" else ""
        raise RecipeError(f"{field}: {first['msg']}", where=where, fix=fix) from error
    _check_steps(recipe, where)
    for rule in (None, *recipe.override):
        recipe._apply(rule)  # methods, options and formats exist
    if recipe.kv is not None:
        for name in (recipe.kv.key, recipe.kv.value):
            head_format(name)
    return recipe


def _takes_any_rate(name: str, encoder: Any, fmt: Format) -> None:
    """Raises RecipeError for an entropy-coded format with a method that cannot use one."""
    if isinstance(fmt, Entropy) and not getattr(encoder, "any_rate", False):
        able = [other for other in names() if kind(other) != "transform" and other != name and _any_rate(other)]
        raise RecipeError(
            f"{name} cannot use {fmt.name}" + (" with these options" if hasattr(encoder, "any_rate") else ""),
            why="it works on codes of a fixed range, and these have none",
            fix=f"{' or '.join(f'{other}:{fmt.name}' for other in able)}, or tune:{fmt.name},steps=0",
        )  # fmt: skip


def _any_rate(name: str) -> bool:
    return bool(getattr(method(name), "any_rate", False))


def _check_steps(recipe: Recipe, where: str) -> None:
    """Raises RecipeError unless the steps are transforms, then at most one encoder with a format."""
    for i, step in enumerate(recipe.step):
        if kind(step.method) == "transform":
            if step.format is not None:
                raise RecipeError(
                    f"{step.method} is a transform and has no format", where=where,
                    why="it prepares weights, an encoder after it rounds them", fix=f"{step.method}+rtn:{step.format}",
                )  # fmt: skip
            method(step.method, step.options)
        elif i + 1 < len(recipe.step):
            raise RecipeError(
                f"{step.method} is an encoder and must come last", where=where,
                fix="transforms first, then one encoder: awq+gptq:int4-g64",
            )  # fmt: skip
        elif step.format is None:
            raise RecipeError(f"{step.method} needs a format", where=where, fix=f"{step.method}:int4-g64")
    if any(step.method == "qllm" for step in recipe.step) and recipe.activations is None:
        raise RecipeError(
            "qllm prepares inputs for rounding, and the recipe rounds none", where=where, fix="+a:int4-token"
        )
    if recipe.encoder is None and (recipe.activations or recipe.override):
        raise RecipeError(
            "only quantized linears can round their inputs or be overridden", where=where,
            fix="an encoder: +rtn:int8-row-sym",
        )  # fmt: skip
    if not recipe.step and recipe.kv is None:
        raise RecipeError("does nothing", where=where, fix="gptq:int4-g64, kv:int4-head, or a .toml file")
    if recipe.tuner is not None and any(rule.method for rule in recipe.override):
        raise RecipeError(
            "a tuner works on whole blocks, so an override cannot name another method", where=where,
            fix="overrides that change the format or keep sites",
        )  # fmt: skip


def _scalar(text: str) -> Scalar:
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _spell(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
