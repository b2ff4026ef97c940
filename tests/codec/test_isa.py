"""Every instruction set decodes the same bits, and refuses the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowbit import _native
from lowbit.codec import stream
from lowbit.errors import FormatError


def cases() -> list[tuple[torch.Tensor, list[int], int]]:
    """Widths around 64, blocks of uneven heights, 1 to 13 segments a panel, raw bits and exceptions."""
    rng = np.random.default_rng(0)
    out = []
    for sigma in (0.3, 1.0, 2.5, 20.0, 3000.0):
        for rows, widths, segment in ((1, [1], 64), (13, [63], 64), (37, [64, 65], 300), (29, [128, 64, 7], 900)):
            codes = np.clip(np.round(rng.standard_t(4, (rows, sum(widths))) * sigma), -32768, 32767)
            out.append((torch.from_numpy(codes.astype(np.int16)), widths, segment))
    return out


def outcome(blob: torch.Tensor, dtype: torch.dtype = torch.int16) -> bytes | str:
    try:
        return stream.decode(blob, dtype=dtype).numpy().tobytes()
    except FormatError as error:
        return str(error)


@pytest.fixture(params=_native.isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LOWBIT_ISA", request.param)
    assert _native.isa() == request.param
    return str(request.param)


def test_codes_come_back(isa: str) -> None:
    for codes, widths, segment in cases():
        blob = stream.encode(codes, widths, segment=segment)
        assert torch.equal(stream.decode(blob), codes), isa
        if codes.abs().max() < 128:
            assert torch.equal(stream.decode(blob, dtype=torch.int8), codes.to(torch.int8)), isa


def test_altered_bytes_give_what_the_portable_decoder_gives(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    for codes, widths, segment in cases()[::3]:
        blob = stream.encode(codes, widths, segment=segment)
        tail = int(stream.HEAD_BYTES + 105 * (len(widths) - 1))
        for _ in range(12):
            bad = blob.clone()
            bad[rng.integers(tail, len(bad))] ^= int(rng.integers(1, 256))
            monkeypatch.setenv("LOWBIT_ISA", "portable")
            expected = outcome(bad)
            monkeypatch.setenv("LOWBIT_ISA", isa)
            assert outcome(bad) == expected


def test_threads_change_nothing(isa: str) -> None:
    codes, widths, segment = cases()[-5]
    out = np.empty(codes.shape, np.int16)
    for threads in (1, 2, 3, 7):
        blob = _native.encode(codes.numpy(), widths, segment, threads)
        np.testing.assert_array_equal(blob, stream.encode(codes, widths, segment=segment).numpy())
        _native.decode_int16(blob, 0, out, threads)
        np.testing.assert_array_equal(out, codes.numpy())


def test_the_fastest_is_taken_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOWBIT_ISA", raising=False)
    assert _native.isa() == _native.isas()[-1]
    assert _native.isas()[0] == "portable"
    monkeypatch.setenv("LOWBIT_ISA", "z80")
    with pytest.raises(ValueError, match="z80"):
        _native.isa()
