"""Blocks with a least value: the node against numpy, and ggml's presets against the gguf package."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from trees import matrix, parts_of

from lowbit.errors import FormatError
from lowbit.formats.blocks import Block
from lowbit.formats.pack import Codes
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Affine, Offset, Raw, build
from lowbit.formats.spec import Spec
from lowbit.methods.clip import ranges

GGML = ["q4_0", "q5_0", "q8_0", "q4_1", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]


def offset(rows: int, columns: int, block: Block) -> Offset:
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(0))
    scale, least = (Raw.of(matrix(*block.count((rows, columns)), seed=s).half()) for s in (1, 2))
    return Offset((rows, columns), Codes.of(codes, 16), scale, least, block)


@pytest.mark.parametrize("block", [Block("group", (16,)), Block("group", (10,)), Block("row"), Block("tile", (2, 8))])
def test_a_product_and_a_sum_each_rounded_once(block: Block) -> None:
    q = offset(5, 48, block)
    scale, least = (block.spread(t.decode(), q.shape).expand(q.shape).numpy() for t in (q.scale, q.offset))
    expected = q.codes.unpack().numpy().astype(np.float32) * scale + least
    assert np.array_equal(q.decode().numpy(), expected)
    assert torch.equal(q.decode(rows=slice(1, 4)), q.decode()[1:4])
    again = build(Spec.from_json(json.loads(json.dumps(q.spec().to_json()))), parts_of(q))
    assert torch.equal(again.decode(), q.decode())


def test_offsets_of_other_blocks_are_refused() -> None:
    q = offset(5, 48, Block("group", (16,)))
    parts = parts_of(q)
    spec = q.spec().to_json()
    spec["static"]["block"] = "group:24"
    with pytest.raises(FormatError, match="scales of shape"):
        build(Spec.from_json(spec), parts)
    spec = q.spec().to_json()
    del spec["children"]["offset"]
    with pytest.raises(FormatError, match="offset is of the wrong kind: missing"):
        build(Spec.from_json(spec), parts)


@pytest.mark.parametrize("name", GGML)
def test_ggmls_presets_cost_what_they_say_and_survive_bad_blocks(name: str) -> None:
    fmt, w = preset(name), 0.05 * matrix(6, 512)
    w[0], w[1, :32], w[2, :32], w[3, :32] = 0, 0.01, -0.02, 1e-9
    q = fmt.encode(w, fmt.fit(w))
    assert not q.problem()
    assert q.nbytes == fmt.nbytes((6, 512))
    assert q.decode()[0].abs().max() == 0
    error = float((q.decode() - w).square().sum() / w.square().sum())
    assert error < 2 / fmt.grid.levels**2  # a uniform step in a block's range, and what coded scales add


@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q8_0", "q4_1", "q5_1"])
def test_simple_presets_are_as_good_as_ggmls_own_rounding(name: str) -> None:
    fmt, w = preset(name), matrix(16, 256)
    theirs = quants.dequantize(quants.quantize(w.numpy(), kind := GGMLQuantizationType[name.upper()]), kind)
    error = float((fmt.encode(w, fmt.fit(w)).decode() - w).square().sum())
    assert error == pytest.approx(float(np.square(theirs - w.numpy()).sum()), rel=2e-3)


def test_a_signed_grid_spares_no_level_and_a_clip_keeps_its_sign() -> None:
    fmt, w = preset("q4_0"), matrix(4, 32)
    params = fmt.fit(w)
    codes = fmt.encode(w, params)
    assert isinstance(codes, Affine)
    assert (codes.codes.unpack() == 0).any(dim=1).all()
    assert torch.equal(params.step[:, 0] < 0, w.gather(1, w.abs().argmax(1, keepdim=True))[:, 0] > 0)
    again = fmt.fit(w, ranges=ranges(fmt, params))
    torch.testing.assert_close(again.step, params.step, rtol=1e-3, atol=0)
    searched = fmt.encode(w, fmt.fit(w, None, 10)).decode()
    assert float((searched - w).square().sum()) <= float((codes.decode() - w).square().sum())


def test_coded_offsets_cannot_be_moved_one_by_one() -> None:
    with pytest.raises(FormatError, match="coded together"):
        preset("q4_k").round_zero(torch.zeros(1, 1))
