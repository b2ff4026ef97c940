"""lowbit generate with keys and values in few bits: as the checkpoint says, or as asked for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from ran import Run
from transformers import AutoTokenizer

import lowbit
from lowbit.formats.heads import CacheFormat
from lowbit.io import native
from lowbit.runtime.kvcache import KVCache

ASK = ("-p", "Bird", "-n", 8, "--raw", "--dtype", "float32", "--json")


def expected(root: Path, kv: str) -> tuple[str, int]:
    """What the model says through such a cache, and the cache's bytes."""
    model, tokenizer = lowbit.load(root, dtype=torch.float32), AutoTokenizer.from_pretrained(root)
    inputs = tokenizer("Bird", return_tensors="pt")
    cache = KVCache(model.config, CacheFormat.parse(kv))
    ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), cache.nbytes


def test_the_cache_is_the_checkpoints_or_the_one_asked_for(run: Run, llama: Path) -> None:
    assert run("quantize", llama, "rtn:int8-row+kv:int2-head:int4-head,sink=2", "-o", "out").code == 0
    out = Path("out")
    assert native.settings(out).kv == CacheFormat("int2-head", "int4-head", sink=2)
    for options, kv in (((), "int2-head:int4-head,sink=2"), (("--kv", "int4-channel4:int4-head"), None)):
        found = json.loads(run("generate", out, *ASK, *options).out)
        spelled = kv or options[1]
        assert (found["text"], found["kv_bytes"]) == expected(out, spelled)
        assert found["kv"] == spelled
    shown = run("generate", out, *ASK[:-1], "--kv", "int8-head")
    assert "MB of int8-head" in shown.err


def test_a_model_without_a_kv_format_keeps_its_cache(run: Run, llama: Path) -> None:
    found = json.loads(run("generate", llama, *ASK).out)
    assert found["kv"] is None
    assert found["kv_bytes"] is None


def test_a_kv_format_that_does_not_exist_is_refused(run: Run, llama: Path) -> None:
    asked = run("generate", llama, *ASK, "--kv", "int4-heads")
    assert asked.code != 0
    assert "unknown KV format 'int4-heads'" in asked.err
    assert "did you mean 'int4-head'" in asked.err
