"""Nodes for corrections, changed inputs and nested widths: what they decode to, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import scipy.linalg
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import (
    TREES,
    coded,
    edited,
    fractional_zeros,
    gathered,
    low_rank,
    matrix,
    nested,
    parts_of,
    rotated,
    set_leaf,
)

from lowbit.errors import FormatError
from lowbit.formats.hadamard import hadamard, largest_size, random_signs, sign_values
from lowbit.formats.nodes_nested import buckets, repack
from lowbit.formats.qtensor import Affine, Columns, Gathered, LowRank, Nested, Raw, Rotated, Sparse, Sum, build
from lowbit.formats.spec import Spec

# --- terms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sparse_is_scipys_csr(dtype: torch.dtype) -> None:
    w = matrix(20, 50)
    w[3] = 0  # a row without any
    q = Sparse.of(w, w.abs() > 1.2, dtype)
    csr = scipy.sparse.csr_matrix((q.data.double().numpy(), q.index.numpy(), q.starts.numpy()), shape=(20, 50))
    assert torch.equal(q.decode(), torch.tensor(csr.toarray()).float())
    assert torch.equal(q.decode(), torch.where(w.abs() > 1.2, w, 0).to(dtype).float())
    assert q.count == int((w.abs() > 1.2).sum()) > 50
    assert q.nbytes == q.count * (2 + dtype.itemsize) + 4 * 21
    for rows in (slice(2, 5), slice(3, 4), slice(4, 4), slice(0, 20, 3), slice(-2, None)):
        assert torch.equal(q.decode(rows=rows), q.decode()[rows])


def test_sparse_columns_take_two_bytes_while_they_fit() -> None:
    for width, dtype in ((1 << 15, torch.int16), ((1 << 15) + 1, torch.int32)):
        w = torch.zeros(2, width)
        w[1, -1] = 3
        q = Sparse.of(w, w != 0)
        assert q.index.dtype == dtype
        assert not q.problem()
        assert torch.equal(q.decode(), w)


def test_low_rank_is_the_product_of_its_factors() -> None:
    q = low_rank(matrix(20, 50), rank=4)
    torch.testing.assert_close(q.decode().double(), q.a.double() @ q.b.double(), rtol=1e-6, atol=1e-6)
    assert q.nbytes == 2 * 4 * (20 + 50)
    assert low_rank(matrix(20, 50), rank=0).decode().count_nonzero() == 0


def test_a_zero_may_be_any_number() -> None:
    q = fractional_zeros(matrix(7, 48))
    codes, zero = q.codes.unpack().float(), q.zero.decode().repeat_interleave(16, dim=1)
    assert torch.equal(q.decode(), 0.25 * (codes - zero))
    assert (zero != zero.round()).any()


# --- changed inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_hadamard_is_scipys_in_blocks_and_its_own_inverse(size: int) -> None:
    x = matrix(5, 192)
    H = torch.tensor(scipy.linalg.hadamard(size)).double() / size**0.5
    oracle = torch.cat([block.double() @ H for block in x.split(size, dim=1)], dim=1)
    torch.testing.assert_close(hadamard(x, size).double(), oracle, rtol=0, atol=2e-6)
    torch.testing.assert_close(hadamard(hadamard(x, size), size), x, rtol=0, atol=2e-6)
    assert torch.equal(hadamard(x.view(5, 3, 64), min(size, 64)), hadamard(x, size).view(5, 3, 64))


def test_hadamard_of_16_bits_neither_overflows_nor_rounds_on_the_way() -> None:
    x = torch.full((1, 256), 6e4, dtype=torch.float16)
    x[0, 1:] *= -1 / 256
    assert hadamard(x, 256).isfinite().all()
    assert torch.equal(hadamard(x, 256), hadamard(x.float(), 256).half())


def test_signs_are_of_their_seed_and_fair() -> None:
    signs = sign_values(random_signs(4096, 3))
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.05
    assert torch.equal(signs, sign_values(random_signs(4096, 3)))
    assert not torch.equal(signs, sign_values(random_signs(4096, 4)))
    assert random_signs(4096, 3).data.numel() == 512
    assert [largest_size(n) for n in (1, 576, 1536, 4096, 11008)] == [1, 64, 512, 4096, 256]


@pytest.mark.parametrize("make", [rotated, gathered])
def test_inputs_that_enter_meet_the_inner_matrix(make: Callable[[torch.Tensor], Rotated | Gathered]) -> None:
    w = matrix(24, 64)
    q, x = make(w), matrix(9, 64, seed=7)
    for batch in (x, x.view(3, 3, 64), x[0]):
        y, expected = q.enter(batch) @ q.inner.decode().T, batch @ q.decode().T
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-5)
    assert q.enter(x.bfloat16()).dtype == torch.bfloat16


def test_a_rotation_spreads_an_outlier_and_keeps_lengths() -> None:
    x = matrix(50, 64)
    x[:, 5] *= 100
    q = rotated(matrix(4, 64), size=64)
    assert q.enter(x).abs().max() < x.abs().max() / 5
    torch.testing.assert_close(q.enter(x).norm(dim=1), x.norm(dim=1))


def test_gathered_inner_is_exact_where_channels_are_split_and_averages_what_is_merged() -> None:
    w, x = matrix(24, 64), matrix(9, 64, seed=7)
    q = gathered(w)
    exact = Gathered(
        q.shape, q.index, q.scale, Raw.of(torch.cat([w[:, :1].repeat(1, 3), w[:, 1:62], w[:, 62:].sum(1, True)], 1))
    )
    assert not exact.problem()
    torch.testing.assert_close(exact.decode()[:, :62], w[:, :62])
    for merged in (62, 63):  # (x62 + x63) / 2 meets w62 + w63
        torch.testing.assert_close(exact.decode()[:, merged], w[:, 62:].mean(1))
    torch.testing.assert_close(q.enter(x)[:, :3], (x[:, :1] / 3).expand(-1, 3))
    torch.testing.assert_close(q.enter(x)[:, -1], x[:, 62:].mean(1))


# --- nested widths ---------------------------------------------------------------------------------------------------


def test_slicing_rounds_then_clamps() -> None:
    """A8.1: the paper's own example, 234 read at 2 bits is 192, and 256 without the clamp."""
    q = torch.tensor([234], dtype=torch.uint8)
    assert int(buckets(q, 2, False)) << 6 == 192
    assert int(buckets(q, 2, True)) << 6 == 256


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("extra", [False, True])
def test_buckets_are_the_formula_over_every_code(bits: int, extra: bool) -> None:
    step = 2 ** (8 - bits)
    expected = [int(q / step + 0.5) if extra else min(int(q / step + 0.5), 2**bits - 1) for q in range(256)]
    assert buckets(torch.arange(256, dtype=torch.uint8), bits, extra).tolist() == expected


@pytest.mark.parametrize("name", ["int8-row", "int8-row-sym", "int8-g64"])
def test_nested_is_the_parents_scale_on_sliced_codes(name: str) -> None:
    w = matrix(12, 100)
    parent = coded(name, w)
    assert isinstance(parent, Affine)
    block = parent.block
    zero = (
        128.0
        if parent.zero is None
        else block.spread(parent.zero.unpack().view(block.count((12, 100))).float(), (12, 100))
    )
    scale = block.spread(parent.scale.decode(), (12, 100))
    q = parent.codes.unpack().float()
    expected = scale * (torch.clamp(torch.floor(q / 16 + 0.5), max=15) * 16 - zero)
    assert torch.equal(Nested(parent.shape, parent, 4, False).decode(), expected)
    assert torch.equal(Nested(parent.shape, parent, 8, False).decode(), parent.decode())


@pytest.mark.parametrize("name", ["int8-row", "int8-row-sym", "int8-g64", "int8-tensor"])
@pytest.mark.parametrize("extra", [False, True])
def test_repacking_changes_no_value_and_sheds_the_lower_bits(name: str, extra: bool) -> None:
    w = matrix(16, 256) * torch.logspace(-3, 3, 16).view(-1, 1)  # scales from subnormal float16 to large
    parent = coded(name, w)
    for bits in (2, 3, 4, 6, 8):
        q = Nested(parent.shape, parent, bits, extra)
        packed = repack(q)
        assert torch.equal(packed.decode(), q.decode()), bits
        again = build(packed.spec(), parts_of(packed))
        assert torch.equal(again.decode(), q.decode())
        over = int((buckets(parent.codes.unpack(), bits, True) == 1 << bits).sum()) if bits < 8 else 0
        if isinstance(packed, Sum):
            sparse = packed.terms[1]
            assert isinstance(sparse, Sparse)
            assert sparse.count == over
            packed = packed.terms[0]
        assert packed.nbytes == parent.nbytes - 16 * 256 * (8 - bits) // 8 + (3 if bits < 8 and parent.zero else 0)


def test_a_symmetric_parent_repacks_to_a_plain_symmetric_grid() -> None:
    packed = repack(nested(matrix(16, 128), 4, name="int8-g64-sym"))
    assert isinstance(packed, Affine)
    assert packed.spec() == coded("int4-g64-sym", matrix(16, 128)).spec()


def test_a_scale_that_outgrows_float16_is_stored_wider() -> None:
    w = matrix(4, 64) * 1e6
    q = Nested((4, 64), coded("int8-row", w), 2, True)
    packed = repack(q)
    torch.testing.assert_close(packed.decode(), q.decode(), rtol=1e-6, atol=0)
    assert packed.decode().isfinite().all()


# --- what is refused -------------------------------------------------------------------------------------------------

HOSTILE: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "factors of another matrix": ("low rank", lambda v: v.update(shape=[16, 99]), "factors have shapes"),
    "one factor": ("low rank", lambda v: v["leaves"].pop(), "b is of the wrong kind"),
    "a factor that is no matrix": ("low rank", lambda v: set_leaf(v, "a", 2, [48]), "the spec says"),
    "rows without starts": ("sparse", lambda v: v.update(shape=[17, 100]), "starts, index and data have shapes"),
    "columns that are not there": ("sparse", lambda v: v.update(shape=[16, 90]), "index reaches"),
    "a rotation larger than the matrix": ("rotated", lambda v: v["static"].update(size=8), "size 8"),
    "a rotation of three": ("rotated", lambda v: v["static"].update(size=3), "size 3"),
    "a rotation of nothing": ("rotated", lambda v: v["static"].update(size=0), "size 0"),
    "a size that is a truth": ("rotated", lambda v: v["static"].update(size=True), "size is of the wrong kind"),
    "signs of another width": ("rotated", lambda v: set_leaf(v, "signs", 3, 99), "99 columns"),
    "signs of four values": ("rotated", lambda v: set_leaf(v, "signs", 4, 4), "signs of 4 levels"),
    "another rotated matrix": ("rotated", lambda v: v.update(shape=[16, 96]), "a rotated matrix of shape"),
    "gathered from nowhere": ("gathered", lambda v: v.update(shape=[16, 99]), "index reaches"),
    "gathered rows": ("gathered", lambda v: v.update(shape=[15, 100]), "for a matrix of shape"),
    "shares of another shape": ("gathered", lambda v: v["children"]["scale"].update(shape=[101, 1]), "data has shape"),
    "one bit": ("nested", lambda v: v["static"].update(bits=1), "1 bits of 8"),
    "nine bits": ("nested", lambda v: v["static"].update(bits=9), "9 bits of 8"),
    "bits in words": ("nested", lambda v: v["static"].update(bits="3"), "bits is of the wrong kind"),
    "a number for extra": ("nested", lambda v: v["static"].update(extra=1), "extra is of the wrong kind"),
    "another parent": ("nested", lambda v: v.update(shape=[15, 100]), "a parent of shape"),
    "zeros of other blocks": (
        "fractional zeros", lambda v: v["children"]["zero"].update(shape=[1, 7]), "data has shape",
    ),
    "a number for a zero": (
        "fractional zeros", lambda v: v.update(children={"scale": v["children"]["scale"]}, static={"zero": 8}), "kind",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_spec_that_does_not_fit_its_parts_is_refused(kind: str) -> None:
    name, change, message = HOSTILE[kind]
    q = TREES[name](matrix(16, 100))
    with pytest.raises(FormatError, match=message) as error:
        build(Spec.from_json(edited(q, change)), parts_of(q))
    assert error.value.where


def test_only_eight_bit_affine_parents_nest() -> None:
    w = matrix(4, 64)
    for name in ("int4-row", "nf4"):
        assert "8-bit codes" in Nested((4, 64), coded(name, w), 2, False).problem()


def test_parts_that_are_whole_but_do_not_go_together_are_refused() -> None:
    w, zeros = matrix(16, 100), fractional_zeros(matrix(16, 100))
    for q, message in (
        (LowRank((16, 100), matrix(16, 3), matrix(2, 100)), "factors have shapes"),
        (LowRank((16, 100), matrix(1, 16)[0], matrix(3, 100)), "factors have shapes"),
        (dataclasses.replace(zeros, zero=Raw.of(matrix(16, 6))), "zeros of shape"),
        (Columns((16, 100), torch.tensor([[1], [2]]), Raw.of(w[:, 1:3])), "columns hold a matrix"),
        (Raw((16, 100), matrix(1, 100)[0]), "data has shape"),
        (dataclasses.replace(TREES["stored table"](w), table=matrix(2, 2)), "table has shape"),
    ):
        with pytest.raises(FormatError, match=message):
            build(q.spec(), parts_of(q))


@pytest.mark.parametrize(
    ("part", "at", "value", "message"),
    [
        ("starts", 0, 1, "starts do not ascend"),
        ("starts", 2, 1000, "starts do not ascend"),
        ("starts", 5, -3, "starts do not ascend"),
        ("starts", -1, 7, "starts do not ascend"),
        ("index", 0, 100, "index reaches"),
        ("index", 0, -1, "index reaches"),
        ("index", 1, 0, "does not ascend"),
    ],
)
def test_sparse_parts_that_reach_elsewhere_are_refused(part: str, at: int, value: int, message: str) -> None:
    q = TREES["sparse"](matrix(16, 100))
    parts = {path: data.clone() for path, data in parts_of(q).items()}
    parts[part][at] = value
    with pytest.raises(FormatError, match=message):
        build(q.spec(), parts)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_numbers_a_sparse_file_holds_it_is_refused_or_decodes(data: st.DataObject) -> None:
    q = TREES["sparse"](matrix(6, 20))
    parts = {path: t.clone() for path, t in parts_of(q).items()}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(["starts", "index"]))
        parts[name][data.draw(st.integers(0, len(parts[name]) - 1))] = data.draw(st.integers(-40, 40))
    try:
        tree = build(q.spec(), parts)
    except FormatError:
        return
    assert tree.decode().count_nonzero() == q.decode().count_nonzero()
