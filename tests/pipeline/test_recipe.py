"""Recipes: both spellings, overrides, identity, and errors that name the nearest known word."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.errors import RecipeError
from lowbit.pipeline.recipe import Calibration, Override, Recipe, Step, Treatment, parse, with_calibration

TOML = """
[[step]]
method = "gptq"
format = "int4-g64"
options = { damp = 0.02, act_order = true }
[[override]]
sites = "model.layers.0.*"
keep = "the first block is fragile"
[[override]]
sites = "*.down_proj"
format = "int8-row"
[[override]]
sites = "*.o_proj"
options = { damp = 0.1 }
[[override]]
sites = "*.up_proj"
method = "rtn"
[calibration]
samples = 16
length = 128
propagate = "original"
"""

SITES = [f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in ("q_proj", "o_proj", "up_proj", "down_proj")]


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(TOML)
    return path


def treated(recipe: Recipe, site: str) -> Treatment:
    found = recipe.treatment(site)
    assert isinstance(found, Treatment)
    return found


def test_one_line() -> None:
    recipe = parse("gptq:int4-g64,damp=0.02,act_order=false,static_groups=false,block=32")
    found = treated(recipe, "anything")
    assert (found.method, found.format.name) == ("gptq", "int4-g64")
    assert (found.encoder.damp, found.encoder.act_order, found.encoder.block) == (0.02, False, 32)  # type: ignore[attr-defined]
    assert recipe.line == "gptq:int4-g64,act_order=false,block=32,damp=0.02,static_groups=false"
    assert parse(recipe.line) == recipe
    assert recipe.calibration == Calibration()


def test_toml_and_the_first_match_wins(toml: Path) -> None:
    recipe = parse(str(toml))
    recipe.check(SITES)
    assert recipe.treatment("model.layers.0.down_proj") == "the first block is fragile"
    assert treated(recipe, "model.layers.1.q_proj").encoder.damp == 0.02  # type: ignore[attr-defined]
    down = treated(recipe, "model.layers.1.down_proj")
    assert (down.method, down.format.name, down.encoder.damp) == ("gptq", "int8-row", 0.02)  # type: ignore[attr-defined]
    assert treated(recipe, "model.layers.1.o_proj").encoder.damp == 0.1  # type: ignore[attr-defined]
    up = treated(recipe, "model.layers.1.up_proj")
    assert (up.method, up.format.name) == ("rtn", "int4-g64")  # the options are those of gptq and do not carry over
    assert (recipe.calibration.samples, recipe.calibration.propagate) == (16, "original")
    assert recipe.line == "gptq:int4-g64,act_order=true,damp=0.02+4"


def test_identity(toml: Path) -> None:
    line = parse("gptq:int4-g64,damp=0.02,act_order=true")
    assert line.digest == parse("gptq:int4-g64,act_order=true,damp=0.02").digest
    digests = {
        line.digest, parse("gptq:int4-g64,damp=0.03,act_order=true").digest, parse("rtn:int4-g64").digest,
        parse("rtn:int4-g128").digest, parse(str(toml)).digest, with_calibration(line, seed=1).digest,
        with_calibration(line, samples=64).digest,
    }  # fmt: skip
    assert len(digests) == 7
    assert with_calibration(line, samples=None, seed=None) == line
    assert Recipe.model_validate(parse(str(toml)).model_dump()) == parse(str(toml))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gptq", "gptq needs a format\nTry: gptq:int4-g64"),
        ("awq:int4-g64", r"awq is a transform and has no format(.|\n)*Try: awq\+rtn:int4-g64"),
        ("rtn:int4-g64+awq", "rtn is an encoder and must come last"),
        ("a:int8-token", "only quantized linears can round their inputs"),
        ("rtn:int4-g64+a:int9-token", "unknown activation format 'int9-token'\nTry: did you mean"),
        ("kv:int9-head", "unknown KV format 'int9-head'\nTry: did you mean"),
        ("kv", "'kv' names nothing"),
        ("smoothquant,alpha=2.0", "alpha is 2.0"),
        ("smoothquant,alpha=best", "alpha is 'best'"),
        ("gtpq:int4-g64", "unknown method 'gtpq'\nTry: did you mean 'gptq'"),
        ("gptq:int4g64", r"unknown format 'int4g64'\nTry: did you mean 'int4-g64'"),
        ("gptq:int4-g64,dump=0.1", "gptq has no option 'dump'\nTry: did you mean 'damp'"),
        ("gptq:int4-g64,damp", "'damp' is not OPTION=VALUE"),
        ("gptq:int4-g64,damp=much", "option 'damp' of gptq is .*float, got 'much'"),
        ("gptq:int4-g64,act_order=1", "option 'act_order' of gptq is .*bool, got 1"),
        ("gptq:int4-g64,damp=-1.0", "damp -1.0"),
        ("gptq:int4-g64,damp=nan", "damp"),
        ("gptq:int4-g64,damp=inf", "damp"),
        ("no-such.toml", r"no-such\.toml: does not exist"),
    ],
)
def test_lines_that_mean_nothing(line: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(line)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[[step]]", "[[stepp]]", "stepp: Extra inputs .*\nTry: did you mean 'step'"),
        ("samples = 16", "sample = 16", r"calibration\.sample: .*\nTry: did you mean 'samples'"),
        ("samples = 16", "samples = 0", r"calibration\.samples: .*greater than or equal to 1"),
        ("samples = 16", 'samples = "16"', r"calibration\.samples: .*valid integer"),
        ('propagate = "original"', 'propagate = "both"', r"calibration\.propagate: "),
        ('keep = "the first block is fragile"', 'keep = ""', "keep is the reason"),
        ('keep = "the first block is fragile"', 'keep = "x"\nformat = "nf4"', "either keeps its sites, with a reason"),
        ('keep = "the first block is fragile"', "", "either keeps its sites, with a reason"),
        ('format = "int8-row"', 'format = "int8-rows"', "unknown format 'int8-rows'\nTry: did you mean 'int8-row'"),
        ('method = "rtn"', 'method = "rtm"', "unknown method 'rtm'\nTry: did you mean 'rtn'"),
        ("damp = 0.1", "damp = nan", "damp"),
        ("[[step]]", "[[step]", "is not TOML"),
        (
            '[[step]]\nmethod = "gptq"\nformat = "int4-g64"\noptions = { damp = 0.02, act_order = true }',
            "",
            "an encoder",
        ),
    ],
)
def test_files_that_mean_nothing(toml: Path, old: str, new: str, message: str) -> None:
    assert old in TOML
    toml.write_text(TOML.replace(old, new, 1))
    with pytest.raises(RecipeError, match=message):
        parse(str(toml))


def test_a_recipe_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(RecipeError, match=r"folder\.toml: cannot be read: Is a directory"):
        parse(str(tmp_path / "folder.toml"))


def test_overrides_that_decide_nothing_are_errors(toml: Path) -> None:
    step = [Step(method="rtn", format="int4-g64")]
    typo = Recipe(step=step, override=[Override(sites="*.dwn_proj", format="int8-row")])
    with pytest.raises(RecipeError, match=r"'\*\.dwn_proj' matches no site\n.*\n.*leaves: down_proj, o_proj"):
        typo.check(SITES)
    late = [Override(sites="*.down_proj", format="int8-row"), Override(sites="*.1.down_proj", keep="fragile")]
    with pytest.raises(RecipeError, match=r"'\*\.1\.down_proj' comes after others that take all its sites"):
        Recipe(step=step, override=late).check(SITES)
    Recipe(step=step, override=late[::-1]).check(SITES)


def test_calibration_changes_are_checked_too() -> None:
    with pytest.raises(RecipeError, match=r"calibration\.samples"):
        with_calibration(parse("rtn:int4-g64"), samples=0)


@pytest.mark.parametrize(
    "line",
    [
        "smoothquant,alpha=auto+gptq:int4-g64,damp=0.02+a:int8-token+kv:int4-head",
        "rotate,fused=true+rtn:int4-g64+a:int4-token+kv:int4-channel32:int2-head,sink=4,window=32",
        "awq+clip+rtn:int4-g64+until:transforms",
        "kv:int8-head",
        "rotate",
    ],
)
def test_a_composed_line_is_spelled_as_it_was(line: str) -> None:
    assert parse(line).line == line
    assert parse(parse(line).line) == parse(line)


def test_a_composed_file_is_the_line(tmp_path: Path) -> None:
    path = tmp_path / "w8a8.toml"
    path.write_text(
        '[[step]]\nmethod = "smoothquant"\noptions = { alpha = 0.8 }\n'
        '[[step]]\nmethod = "rtn"\nformat = "int8-row-sym"\n'
        '[activations]\nformat = "int8-token"\n[kv]\nkey = "int4-head"\nvalue = "int4-head"\n'
    )
    assert parse(str(path)) == parse("smoothquant,alpha=0.8+rtn:int8-row-sym+a:int8-token+kv:int4-head")
