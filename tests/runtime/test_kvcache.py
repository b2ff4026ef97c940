"""The low-bit cache against a twin that keeps everything raw and rounds the whole history anew at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, VOCAB, family_model
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from lowbit.errors import FormatError, ModelError
from lowbit.formats.heads import CacheFormat, head_format
from lowbit.runtime.kvcache import KVCache

FORMATS = [
    "int8-head", "int4-head-sym", "int3-g8:int2-head", "int2-channel8:int4-head", "int4-head-hadamard", "raw:int4-head",
    "fp8-e4m3-head", "int4-channel4,sink=3,window=5", "int2-head,sink=2,window=9",
]  # fmt: skip


class Twin(DynamicLayer):  # type: ignore[misc]
    """Stateless: what is rounded follows from the length of the history alone. Nothing is packed or forgotten."""

    def __init__(self, kv: CacheFormat) -> None:
        super().__init__()
        self.kv = kv

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        whole_keys, whole_values = super().update(keys, values)
        return self.seen(whole_keys, self.kv.key), self.seen(whole_values, self.kv.value)

    def seen(self, history: torch.Tensor, name: str) -> torch.Tensor:
        fmt = head_format(name)
        if fmt is None:
            return history
        ready = max(history.shape[2] - self.kv.sink - self.kv.window, 0) // fmt.tokens * fmt.tokens
        if not ready:
            return history
        coded = slice(self.kv.sink, self.kv.sink + ready)
        out = history.clone()
        out[:, :, coded] = fmt.decode(fmt.encode(history[:, :, coded]), history.shape[3], history.dtype)
        return out


def twin(kv: CacheFormat, layers: int = 2) -> Cache:
    return Cache(layers=[Twin(kv) for _ in range(layers)])


def hidden(model: Any, ids: torch.Tensor, cache: Any, sizes: list[int]) -> torch.Tensor:
    """Final hidden states, so many tokens at a time."""
    with torch.inference_mode():
        parts = [
            model.base_model(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state
            for part in ids.split(sizes, dim=1)
        ]
    return torch.cat(parts, dim=1)


RAW = CacheFormat("raw", "raw")
IDS = torch.randint(1, VOCAB, (2, 32), generator=torch.Generator().manual_seed(7))
NEAR = {"rtol": 0, "atol": 2e-3}  # sums in another order can take a number across the middle between two codes
SIZES = [13, 1, 7, 11]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_sees_the_rounded_history(name: str) -> None:
    """Grouped and single heads, ALiBi, and a sliding window of 24, beyond which tokens are forgotten."""
    model, kv = family_model(name), CacheFormat.parse("int2-channel8:int3-head,sink=2,window=5")
    expected = hidden(model, IDS, twin(kv), SIZES)
    torch.testing.assert_close(hidden(model, IDS, KVCache(model.config, kv), SIZES), expected, **NEAR)
    assert float((expected - hidden(model, IDS, twin(RAW), [32])).abs().max()) > 1e-2


@pytest.mark.parametrize("text", FORMATS)
def test_every_format_with_and_without_a_mirror(text: str) -> None:
    """Attention slides over 10 tokens, so that groups are forgotten while others are read."""
    kv, model = CacheFormat.parse(text), family_model("mistral", sliding_window=10)
    expected = hidden(model, IDS, twin(kv), SIZES)
    plain = hidden(model, IDS, KVCache(model.config, kv), SIZES)
    torch.testing.assert_close(plain, expected, **NEAR)
    assert torch.equal(hidden(model, IDS, KVCache(model.config, kv, mirror=True), SIZES), plain)


def test_without_a_window_a_format_a_token_does_not_depend_on_chunks() -> None:
    """The current token is rounded too; a raw window is another matter: a long chunk sees less of it."""
    model = family_model("llama")
    one, window = CacheFormat.parse("int4-head"), CacheFormat.parse("int4-head,window=8")
    at_once, each = [32], [8, 1, 1, 1, 21]
    a, b = (hidden(model, IDS, KVCache(model.config, one), sizes) for sizes in (at_once, each))
    torch.testing.assert_close(a, b, **NEAR)
    a, b = (hidden(model, IDS, KVCache(model.config, window), sizes) for sizes in (at_once, each))
    assert float((a - b).abs().max()) > 0.1


@pytest.mark.parametrize("text", ["int4-head", "int2-channel4:int2-head,sink=1,window=3"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_is_that_of_the_twin(text: str, beams: int, families: dict[str, Path]) -> None:
    """With prompts of two lengths, padded on the left; beams are reordered in the cache."""
    model, kv = AutoModelForCausalLM.from_pretrained(families["llama"], dtype=torch.float32), CacheFormat.parse(text)
    mask = torch.ones_like(IDS[:, :12])
    mask[0, :5] = 0
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    made = {}
    for kind, cache in (("ours", KVCache(model.config, kv)), ("twin", twin(kv)), ("raw", None)):
        made[kind] = model.generate(IDS[:, :12], attention_mask=mask, past_key_values=cache, **how)
    assert torch.equal(made["ours"], made["twin"])
    assert not torch.equal(made["ours"], made["raw"])


def test_the_bytes_are_those_of_what_is_stored() -> None:
    """Two layers, two prompts, two heads of 16: 8 bytes of codes, 2 of scale and 1 of zero a head and token."""
    model, heads = family_model("llama"), 2 * 2 * 2
    cache = KVCache(model.config, CacheFormat.parse("int4-head"))
    assert cache.nbytes == 0
    hidden(model, IDS, cache, SIZES)
    assert cache.nbytes == 2 * heads * 32 * 11
    mirrored = KVCache(model.config, cache.kv, mirror=True)
    hidden(model, IDS, mirrored, SIZES)
    assert mirrored.nbytes == cache.nbytes
    cache = KVCache(model.config, CacheFormat.parse("int2-channel8:raw,sink=3,window=6"))
    hidden(model, IDS, cache, SIZES)
    groups, raw = (32 - 3 - 6) // 8, 3 + 6 + (32 - 3 - 6) % 8
    keys = groups * 16 * (2 + 2 + 1) + raw * 16 * 4
    assert cache.nbytes == heads * (keys + 32 * 16 * 4)


def test_a_sliding_layer_forgets_what_its_window_has_passed() -> None:
    model = family_model("mistral")
    for text, extra in (("int4-head", 0), ("int4-channel8", 7), ("raw", 0)):
        cache = KVCache(model.config, CacheFormat.parse(text))
        hidden(model, IDS, cache, SIZES)
        fmt = head_format(text)
        a_token = 16 * 4 if fmt is None else fmt.bits(16) * 16 / 8
        tokens = 2 * 2 * 2 * 2  # layers, prompts, heads, keys and values
        kept = 24 - 1
        least = tokens * (kept * a_token)
        assert least <= cache.nbytes <= least + tokens * extra * 16 * 4
        assert cache.get_seq_length() == 32


def test_it_starts_anew_and_follows_its_batch() -> None:
    model, kv = family_model("llama"), CacheFormat.parse("int4-channel4:int4-head,window=2")
    cache = KVCache(model.config, kv)
    first = hidden(model, IDS, cache, SIZES)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    assert torch.equal(hidden(model, IDS, cache, SIZES), first)
    nbytes = cache.nbytes
    cache.batch_repeat_interleave(3)
    assert cache.nbytes == 3 * nbytes
    cache.batch_select_indices(torch.tensor([3, 4]))  # the second prompt, twice
    assert cache.nbytes == nbytes
    new = torch.tensor([[5], [5]])
    a, b = hidden(model, new, cache, [1])
    assert torch.equal(a, b)
    fresh = KVCache(model.config, kv)
    again = hidden(model, torch.cat([IDS[1:], new[:1]], dim=1), fresh, [*SIZES, 1])
    torch.testing.assert_close(a, again[0, -1:], **NEAR)


def test_what_cannot_be_done_is_refused() -> None:
    model = family_model("llama", head_dim=24)
    with pytest.raises(FormatError, match="a head of 24 numbers"):
        hidden(model, IDS, KVCache(model.config, CacheFormat.parse("int4-head-hadamard")), [32])
    cache = KVCache(model.config, CacheFormat.parse("int4-head"))
    hidden(model, IDS, cache, [32])
    cache.crop(0)
    with pytest.raises(FormatError, match="cannot be shortened"):
        cache.crop(-1)
    assert not cache.is_croppable
    recurrent = family_model("llama").config
    recurrent.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="layer 1 keeps a LinearAttentionLayer"):
        KVCache(recurrent, CacheFormat.parse("int4-head"))
