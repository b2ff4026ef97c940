from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import StudyError
from lowbit.study.keys import cell_key, code_version

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


def test_each_ingredient_changes_the_key() -> None:
    base = ("score", ("a", "b"), {"tokens": 100}, "v1")
    keys = {
        cell_key(*base),
        cell_key("scores", *base[1:]),
        cell_key(base[0], ("b", "a"), *base[2:]),
        cell_key(base[0], ("ab",), *base[2:]),
        cell_key(*base[:2], {"tokens": 101}, base[3]),
        cell_key(*base[:2], {"tokens": "100"}, base[3]),
        cell_key(*base[:2], {"tokens": 100, "seed": None}, base[3]),
        cell_key(*base[:3], "v2"),
    }
    assert len(keys) == 8
    assert all(len(key) == 64 and int(key, 16) >= 0 for key in keys)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text(), JSON, min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_parameters_does_not_matter(params: dict[str, object], rng: random.Random) -> None:
    items = list(params.items())
    rng.shuffle(items)
    assert cell_key("s", (), dict(items), "v") == cell_key("s", (), params, "v")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_what_json_cannot_spell_is_refused(value: object) -> None:
    with pytest.raises(StudyError, match="stage 'score'"):
        cell_key("score", (), {"x": value}, "v")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "keyspkg"
    (root / "deep").mkdir(parents=True)
    for name in ("__init__.py", "one.py", "deep/__init__.py", "deep/two.py"):
        (root / name).write_text("raise RuntimeError('must not be imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    code_version.cache_clear()
    return root


def _version(*names: str) -> str:
    code_version.cache_clear()
    return code_version(*names)


def test_code_version_follows_the_source_and_nothing_else(package: Path) -> None:
    whole, one, deep = _version("keyspkg"), _version("keyspkg.one"), _version("keyspkg.deep")
    assert len({whole, one, deep}) == 3
    (package / "deep" / "notes.txt").write_text("no code")
    (package / "deep" / "__pycache__").mkdir()
    (package / "deep" / "__pycache__" / "two.cpython-311.pyc").write_bytes(b"x")
    (package / "one.py").touch()
    assert (whole, one, deep) == (_version("keyspkg"), _version("keyspkg.one"), _version("keyspkg.deep"))
    (package / "deep" / "two.py").write_text("x = 1\n")
    assert _version("keyspkg.one") == one
    assert _version("keyspkg.deep") != deep
    assert _version("keyspkg") != whole
    renamed = _version("keyspkg.deep")
    (package / "deep" / "two.py").rename(package / "deep" / "three.py")
    assert _version("keyspkg.deep") != renamed


@pytest.mark.parametrize("name", ["no_such_package_here", "lowbit.no_such_module", "__main__", "", "sys"])
def test_a_stage_without_source_is_refused(name: str) -> None:
    with pytest.raises(StudyError, match="no source files"):
        code_version(name)


def test_code_version_of_our_own_modules() -> None:
    assert code_version("lowbit.study.keys") != code_version("lowbit.study.store")
