"""Memory and speed by arithmetic, against published sizes and speeds."""

from __future__ import annotations

import pytest
from tiny import family_model

from lowbit.errors import RecipeError
from lowbit.study import fit
from lowbit.study.fit import Device, Measured, Need

GB = 10**9
LLAMA_7B = fit.Shape(layers=32, kv_heads=32, head_dim=128, hidden=4096, intermediate=11008, vocab=32000)
# llama.cpp on an M2 Ultra, 800 GB/s (its issue 2850); parameters times bits a weight, in tokens/s
ROWS = [Measured(6.74e9 * bpw / 8, rate) for bpw, rate in ((16, 29.73), (8.5, 61.47), (4.5, 86.96))]


def test_one_efficiency_reproduces_three_published_speeds_within_a_fifth() -> None:
    low, middle, high = fit.efficiency(ROWS, 800e9)
    assert 0.4 < low < middle < high < 0.6
    for row in ROWS:
        predicted = fit.decode_rate(round(row.nbytes), 0, 800e9, efficiency=(low, middle, high))
        assert predicted.middle == pytest.approx(row.rate, rel=0.2)
        assert predicted.low <= row.rate * (1 + 1e-6) <= predicted.high * (1 + 2e-6)


def test_falcon_180b_fits_192_gb_in_4_bits_and_not_96_in_5() -> None:
    weights = 180_000_000_000 * 9 // 16  # Q4_0: 4.5 bits
    assert round(weights / GB) == 101
    assert fit.fit(Need(weights), Device(192 * GB, unified=True)).fits
    assert fit.decode_rate(weights, 0, 800e9, efficiency=(1.0, 1.0, 1.0)).middle == pytest.approx(7.9, abs=0.05)
    refused = fit.fit(Need(120 * GB), Device(96 * GB, unified=True))
    assert (refused.fits, refused.usable) == (False, 72 * GB)
    assert refused.spare == -48 * GB
    assert refused.resident == pytest.approx(0.6)
    assert fit.fit(Need(weights), Device(96 * GB, unified=False)).fits is False


def test_a_cache_is_two_numbers_a_head_a_token() -> None:
    assert LLAMA_7B.kv_bytes(2048) == 2 * 32 * 32 * 128 * 2048 * 2 == 2**30
    assert LLAMA_7B.kv_bytes(2048, 4.5) == 2**30 * 4.5 / 16
    need = Need(weights=13 * GB, kv=2**30, activations=10**8, reserve=5 * 10**8)
    tokens = fit.longest_context(need, Device(16 * GB), LLAMA_7B)
    assert fit.fit(Need(13 * GB, LLAMA_7B.kv_bytes(tokens), 10**8, 5 * 10**8), Device(16 * GB)).fits
    assert not fit.fit(Need(13 * GB, LLAMA_7B.kv_bytes(tokens + 1), 10**8, 5 * 10**8), Device(16 * GB)).fits


def test_offloaded_weights_bound_the_rate() -> None:
    whole = fit.decode_rate(10 * GB, GB, 100e9)
    half = fit.decode_rate(10 * GB, GB, 100e9, resident=0.5, slow_bandwidth=5e9)
    assert half.middle == pytest.approx(1 / (6e9 / 50e9 + 1))
    assert half.high < 1 < whole.low
    with pytest.raises(RecipeError, match="50% resident"):
        fit.decode_rate(10 * GB, GB, 100e9, resident=0.5)


@pytest.mark.parametrize(("kind", "heads"), [("llama", 2), ("falcon", 1), ("gpt2", 4), ("opt", 4)])
def test_shapes_of_families_are_those_of_their_caches(kind: str, heads: int) -> None:
    import torch
    from transformers import DynamicCache

    model = family_model(kind)
    shape, cache = fit.shape_of(model.config), DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.ones(1, 7, dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert shape.kv_heads == heads
    assert shape.kv_bytes(7) == 2 * held
