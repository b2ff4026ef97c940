"""Trees: what is built from a spec and parts is what was taken apart, and nothing else can be built."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import SOME, TREES, coded, edited, matrix, parts_of, set_leaf, with_outliers

from lowbit.errors import FormatError
from lowbit.formats.blocks import Block
from lowbit.formats.pack import Codes
from lowbit.formats.qtensor import NODES, Affine, Raw, build
from lowbit.formats.spec import Spec

SHAPES = [(33, 100), (48, 172), (16, 256)]


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TREES)
def test_a_tree_survives_json_and_its_parts(kind: str) -> None:
    shape = SHAPES[list(TREES).index(kind) % len(SHAPES)]
    q = TREES[kind](matrix(*shape))
    spec = Spec.from_json(json.loads(json.dumps(q.spec().to_json())))
    assert spec == q.spec()
    assert hash(spec) == hash(q.spec())
    parts = parts_of(q)
    assert {path: (leaf.shape, leaf.nbytes) for path, leaf in spec.paths().items()} == {
        path: (tuple(data.shape), data.numel() * data.element_size()) for path, data in parts.items()
    }
    again = build(spec, parts)
    assert again.spec() == spec
    assert torch.equal(again.decode(), q.decode())
    prefixed = build(spec, {f"a.b.{path}": data for path, data in parts.items()}, "a.b.")
    assert torch.equal(prefixed.decode(), q.decode())


@pytest.mark.parametrize("kind", SOME)
def test_some_rows_are_the_rows_of_the_whole(kind: str) -> None:
    q = TREES[kind](matrix(33, 100))
    for rows in (slice(0, 1), slice(5, 20), slice(16, None), slice(0, 0)):
        assert torch.equal(q.decode(rows=rows), q.decode()[rows]), rows


@pytest.mark.parametrize("kind", [*TREES, "int4-g64", "nf4-dq", "nvfp4"])
def test_values_are_computed_in_float32_and_cast_once(kind: str) -> None:
    q = TREES[kind](matrix(16, 100))
    assert q.decode().dtype == torch.float32
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(q.decode(dtype), q.decode().to(dtype))


@pytest.mark.parametrize("kind", SOME)
def test_map_touches_every_stored_tensor_once(kind: str) -> None:
    q, seen = TREES[kind](matrix(16, 100)), []
    copied = q.map(lambda t: seen.append(t) or t.clone())  # type: ignore[func-returns-value]
    assert [id(t) for t in seen] == [id(part.data) for part in q.parts()]
    assert len({part.path for part in q.parts()}) == len(seen)
    assert torch.equal(copied.decode(), q.decode())
    assert all(
        a.data.data_ptr() != b.data.data_ptr() for a, b in zip(copied.parts(), q.parts(), strict=True) if a.data.numel()
    )
    assert q.map(lambda t: t.to("meta")).nbytes == q.nbytes


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda t: t[:1]])
def test_map_moves_parts_and_does_not_change_them(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(FormatError, match=r"a part of torch\.float32 \(2, 3\) became"):
        Raw.of(matrix(2, 3)).map(change)


@pytest.mark.parametrize("kind", SOME)
def test_sizes_are_those_of_the_parts(kind: str) -> None:
    q = TREES[kind](matrix(33, 100))
    assert q.nbytes == sum(t.numel() * t.element_size() for t in parts_of(q).values())
    assert q.bits_per_weight == 8 * q.nbytes / 3300
    assert 8 * q.nbytes >= sum(part.logical_bits for part in q.parts()) > 0


# --- meaning ---------------------------------------------------------------------------------------------------------


def test_decoding_does_not_write_to_what_is_stored() -> None:
    for kind in SOME:
        q = TREES[kind](matrix(8, 70))
        before = {path: data.clone() for path, data in parts_of(q).items()}
        q.decode()
        assert all(torch.equal(before[path], data) for path, data in parts_of(q).items()), kind


@pytest.mark.parametrize("text", ["tensor", "row", "group:16", "group:24", "tile:3:5", "flat:7"])
@pytest.mark.parametrize("zeros", [False, True])
def test_affine_is_scale_times_code_minus_zero_everywhere(text: str, zeros: bool) -> None:
    block, shape = Block.parse(text), (7, 48)
    blocks = block.count(shape)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, shape, generator=generator)
    scale = torch.rand(blocks, generator=generator)
    zero = torch.randint(0, 8, blocks, generator=generator)
    q = Affine(shape, Codes.of(codes, 8), Raw.of(scale), Codes.of(zero.view(1, -1), 8) if zeros else None, block)
    assert not q.problem()
    at = block.spread(torch.arange(scale.numel()).view(blocks), shape).expand(shape)
    expected = scale.flatten()[at] * (codes - (zero.flatten()[at] if zeros else 4))
    assert torch.equal(q.decode(), expected)
    assert torch.equal(q.decode(rows=slice(2, 5)), expected[2:5])


def test_outlier_columns_come_back_in_16_bit_and_save_the_rest() -> None:
    w = matrix(32, 128)
    w[:, [7, 100]] *= 50
    q = with_outliers(w, [100, 7])
    assert torch.equal(q.decode()[:, [7, 100]], w[:, [7, 100]].half().float())
    plain = coded("int8-row-sym", w).decode()
    rest = [j for j in range(128) if j not in (7, 100)]
    assert (q.decode() - w)[:, rest].square().sum() < 1e-2 * (plain - w)[:, rest].square().sum()
    assert q.nbytes == 32 * 128 + 32 * 2 + 2 * 32 * 2 + 2 * 8


def test_raw_stands_for_the_whole_of_a_dimension() -> None:
    q = Raw((3, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert q.decode().tolist() == [[1.0, 2.0, 3.0, 4.0]] * 3
    assert q.nbytes == 16


# --- hostile specs ---------------------------------------------------------------------------------------------------


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"node": "Sum", "shape": [1, 1], "static": {}, "leaves": [], "children": {}}
    return value if levels == 0 else {**value, "children": {"0": deep(levels - 1)}}


LEAF = ["codes", "uint8", [16, 50], 100, 16]  # of int4-g64 at (16, 100)


@pytest.mark.parametrize(
    "value",
    [
        None, 3, [], "Raw", {}, deep(9), deep(200),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v.pop("node")),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v.update(shape=[16, -100])),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v.update(shape=[16, 100.0])),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v.update(shape=[True, 100])),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v.update(shape=[1 << 30, 1 << 30])),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v.update(static={"block": ["group:64"]})),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v.update(static={"block": None})),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v.update(leaves=[[*LEAF[:3], "100", 16]])),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v.update(leaves=[[*LEAF[:3], 100, 257]])),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v.update(leaves=[[*LEAF[:3], 100, 1]])),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v.update(leaves=[[*LEAF[:3], -1, 16]])),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v.update(leaves=[[*LEAF[:3], 100, None]])),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v.update(leaves=[["codes", "object", [16, 50], 100, 16]])),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v.update(leaves=[LEAF, LEAF])),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v.update(leaves=[["scale.data", *LEAF[1:]]])),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v["static"].update(scale=1)),
        edited(coded("int4-g64", matrix(16, 100)), lambda v: v["leaves"][0].append(1)),
    ],
)  # fmt: skip
def test_json_that_is_no_spec_is_refused(value: Any) -> None:
    with pytest.raises(FormatError):
        Spec.from_json(value)


def set_scale(v: dict[str, Any], at: int | slice, value: Any) -> None:
    set_leaf(v["children"]["scale"], "data", at, value)


HOSTILE: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "unknown node": ("int4-g64", lambda v: v.update(node="Pickle"), "unknown node"),
    "not a matrix": ("int4-g64", lambda v: v.update(shape=[16, 10, 10]), "no matrix"),
    "more columns than bytes": ("int4-g64", lambda v: v.update(shape=[16, 4000]), "expected 4000 columns"),
    "columns and shape disagree": ("int4-g64", lambda v: set_leaf(v, "codes", 3, 99), "99 columns"),
    "more rows than bytes": ("int4-g64", lambda v: v.update(shape=[17, 100]), "expected 100 columns"),
    "fewer levels than bytes": ("int4-g64-sym", lambda v: set_leaf(v, "codes", 4, 4), "expected 100 columns"),
    "unpacked codes": ("int4-g64-sym", lambda v: set_leaf(v, "codes", slice(3, 5), [None, None]), "codes"),
    "packed scale": ("nf4", lambda v: set_scale(v, slice(3, 5), [2, 16]), "no matrix of bytes"),
    "zeros of other levels": ("int4-g64", lambda v: set_leaf(v, "zero", 4, 8), "zeros of 8 levels"),
    "another group size": ("nf4", lambda v: v["static"].update(block="group:32"), "scales of shape"),
    "no block": ("nf4", lambda v: v["static"].pop("block"), "block"),
    "a strange block": ("nf4", lambda v: v["static"].update(block="group:0"), "unknown block"),
    "a number for a block": ("nf4", lambda v: v["static"].update(block=3), "block"),
    "no scale": ("int4-g64", lambda v: v["children"].pop("scale"), "scale"),
    "no codes": ("int4-g64", lambda v: v["leaves"].pop(0), "codes"),
    "an unknown field": ("int4-g64", lambda v: v["static"].update(evil=1), "no field"),
    "an unknown table": ("nf4", lambda v: v["static"].update(table="nf5"), "unknown table"),
    "a smaller table": ("nf4", lambda v: v["static"].update(table="ternary"), "reach 16 values"),
    "no table": ("nf4", lambda v: v["static"].pop("table"), "table"),
    "a missing part": ("nf4", lambda v: set_scale(v, 0, "dat"), "missing"),
    "a part of another dtype": ("nf4", lambda v: set_scale(v, 1, "float16"), "the spec says"),
    "a part of another shape": ("nf4", lambda v: set_scale(v, 2, [16, 3]), "the spec says"),
    "an index as wide as another": ("outliers", lambda v: v["children"]["1"].update(shape=[16, 2]), "index reaches"),
    "terms of two shapes": ("outliers", lambda v: v.update(shape=[16, 101]), "terms have shapes"),
    "no terms": ("outliers", lambda v: v.update(children={}), "terms"),
    "misnumbered terms": ("outliers", lambda v: v.update(children={"1": v["children"]["1"]}), "no field"),
    "raw that cannot expand": ("raw", lambda v: v.update(shape=[16, 101]), "data has shape"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_spec_that_does_not_fit_its_parts_is_refused(kind: str) -> None:
    name, change, message = HOSTILE[kind]
    q = TREES[name](matrix(16, 100))
    spec = Spec.from_json(edited(q, change))
    with pytest.raises(FormatError, match=message) as error:
        build(spec, parts_of(q))
    assert error.value.where or "unknown block" in message


def test_an_index_out_of_range_is_refused() -> None:
    q = with_outliers(matrix(16, 100), [3, 99])
    parts = parts_of(q)
    for bad in (100, -1):
        parts["1.index"] = torch.tensor([3, bad])
        with pytest.raises(FormatError, match="index reaches"):
            build(q.spec(), parts)


def test_stored_integers_are_no_values() -> None:
    q = Raw.of(matrix(2, 3).to(torch.int8))
    with pytest.raises(FormatError, match=r"data is of the wrong kind: Tensor torch\.int8"):
        build(q.spec(), parts_of(q))


FUZZED = [
    "int3-g64", "nf4-dq", "outliers", "ternary", "nvfp4", "stored table", "fractional zeros", "low rank", "sparse",
    "rotated", "gathered", "nested", "repacked extra",
]  # fmt: skip


@settings(deadline=None, max_examples=160)
@given(st.data())
def test_whatever_is_edited_either_is_refused_or_decodes(data: st.DataObject) -> None:
    """Random edits of valid specs: a tree that builds decodes to its shape; nothing else than FormatError is raised."""
    q = TREES[data.draw(st.sampled_from(FUZZED))](matrix(8, 100))
    value: Any = q.spec().to_json()
    for _ in range(data.draw(st.integers(1, 3))):
        node = value
        while node["children"] and data.draw(st.booleans()):
            node = node["children"][data.draw(st.sampled_from(sorted(node["children"])))]
        key = data.draw(st.sampled_from(["node", "shape", "static", "leaf"]))
        if key == "node":
            node["node"] = data.draw(st.sampled_from(list(NODES)))
        elif key == "shape":
            node["shape"] = data.draw(st.lists(st.sampled_from([0, 1, 2, 8, 100, 200]), min_size=1, max_size=3))
        elif key == "static":
            field = data.draw(st.sampled_from(["block", "table", "size", "bits", "extra"]))
            texts = ["row", "tensor", "group:64", "group:3", "flat:256", "nf4", "e4m3", "ternary", ""]
            node["static"][field] = data.draw(st.sampled_from([*texts, True, -1, 0, 2, 3, 4, 1 << 40]))
        elif node["leaves"]:
            leaf = data.draw(st.sampled_from(node["leaves"]))
            leaf[3:] = data.draw(st.sampled_from([[None, None], [100, 16], [100, 3], [100, 8], [8, 256], [2, 2]]))
    try:
        spec = Spec.from_json(value)
        tree = build(spec, parts_of(q))
    except FormatError:
        return
    assert tree.decode().shape == tree.shape
    assert tree.decode(rows=slice(0, 1)).shape == (min(1, tree.shape[0]), tree.shape[1])
