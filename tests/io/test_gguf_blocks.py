"""ggml blocks: every type against the gguf package's own decoder, and QTensors into blocks without rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from lowbit.errors import CheckpointError, ExportError
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import QTensor
from lowbit.io.gguf.blocks import pack, smallest, unpack
from lowbit.io.gguf.fields import KINDS

ROWS, COLUMNS = 3, 512
TYPES = {t.name.lower(): t for t in GGMLQuantizationType}


def random_blocks(name: str, seed: int = 0) -> torch.Tensor:
    """Any bytes that are valid blocks."""
    kind, generator = KINDS[name], np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (ROWS * COLUMNS // kind.values, kind.nbytes), dtype=np.uint8)
    if name == "mxfp4":
        blocks[:, 0] = generator.integers(0, 255, len(blocks))  # 255 is NaN
    else:
        for at in (kind.scale, kind.offset):
            if at is not None:
                blocks[:, at : at + 2] = generator.normal(size=(len(blocks), 1)).astype(np.float16).view(np.uint8)
    if name == "tq1_0":
        trits = generator.integers(0, 3, (len(blocks), 256)).astype(np.float32) - 1
        trits[:, 0] = 1  # so that its quantizer keeps the scale
        blocks = quants.quantize(trits, TYPES[name]).reshape(blocks.shape)
    return torch.from_numpy(blocks.reshape(ROWS, -1))


def encoded(name: str, columns: int = COLUMNS) -> QTensor:
    fmt = preset(name)
    w = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(1))
    return fmt.encode(w, fmt.fit(w))


@pytest.mark.parametrize("name", KINDS)
def test_blocks_decode_as_in_the_gguf_package_and_pack_to_the_same_bytes(name: str) -> None:
    blocks = random_blocks(name)
    kind = KINDS[name]
    assert (kind.values, kind.nbytes) == GGML_QUANT_SIZES[TYPES[name]]
    q = unpack(name, blocks, COLUMNS)
    assert not q.problem()
    expected = quants.dequantize(blocks.numpy(), TYPES[name])
    got = q.decode().numpy()
    assert np.array_equal(got, expected)
    if name != "mxfp4":  # whose minus zero ggml reads as zero
        assert np.array_equal(got.view(np.int32), expected.view(np.int32))
    assert torch.equal(pack(q, name), blocks)
    assert smallest(q)[0] == name
    assert q.bits_per_weight < 8 * kind.nbytes / kind.values + 0.1


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("q4_0", "q4_0"), ("q5_1", "q5_1"), ("q2_k", "q2_k"), ("q6_k", "q6_k"), ("mxfp4", "mxfp4"),
        ("int4-g32-sym", "q4_0"), ("int4-row-sym", "q4_0"), ("int3-g64-sym", "q4_0"), ("int5-g128-sym", "q5_0"),
        ("int4-g64", "q5_0"), ("int6-tensor-sym", "q8_0"), ("ternary-g256", "tq1_0"), ("ternary", "q4_0"),
    ],
)  # fmt: skip
def test_formats_find_the_smallest_type_that_has_their_values(recipe: str, kind: str) -> None:
    q = encoded(recipe)
    found, (blocks,) = smallest(q)
    assert found == kind
    assert np.array_equal(quants.dequantize(blocks.numpy(), TYPES[found]), q.decode().numpy())


def test_integers_with_zeros_become_a_scale_and_an_offset_where_that_is_exact() -> None:
    fmt = preset("int4-g32")
    w = torch.arange(16.0).repeat(ROWS, 2 * COLUMNS // 32) / 8 - 0.5  # scale 1/8, zero 4
    q = fmt.encode(w, fmt.fit(w))
    found, (blocks,) = smallest(q)
    assert found == "q4_1"
    assert np.array_equal(quants.dequantize(blocks.numpy(), TYPES["q4_1"]), w.numpy())


@pytest.mark.parametrize(
    ("recipe", "columns", "kind", "why"),
    [
        ("nf4", 512, None, "no whole numbers times a scale"),
        ("int4-g16-sym", 512, None, "no float16 numbers of such blocks"),
        ("int8-g32", 512, "q8_0", "codes reach"),
        ("int4-g32-sym", 48, None, "no multiple of 32"),
        ("int4-g32-sym", 512, "q6_k", "no whole numbers times a scale of 256"),
        ("q4_1", 512, "q4_0", "no whole numbers times a scale"),
        ("int4-g32-sym", 512, "q9_z", "'q9_z' is not read or written"),
    ],
)
def test_what_blocks_cannot_have_is_refused_with_the_reason(
    recipe: str, columns: int, kind: str | None, why: str
) -> None:
    with pytest.raises(ExportError, match=why):
        pack(encoded(recipe, columns), kind) if kind else smallest(encoded(recipe, columns))


def test_blocks_that_are_none_are_refused() -> None:
    infinite = random_blocks("q4_k")
    infinite[0, 2:4] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="infinite or NaN"):
        unpack("q4_k", infinite, COLUMNS)
    power = random_blocks("mxfp4")
    power[1, 17] = 255
    with pytest.raises(CheckpointError, match="power of two is NaN"):
        unpack("mxfp4", power, COLUMNS)
    with pytest.raises(CheckpointError, match="are no 480 weights"):
        unpack("q4_0", random_blocks("q4_0"), 480)
    with pytest.raises(CheckpointError, match="did you mean 'q4_k'"):
        unpack("q4_kk", random_blocks("q4_k"), COLUMNS)
