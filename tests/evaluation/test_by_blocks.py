"""Models scored block by block against the same models in memory, and what is held and read meanwhile."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCAB

import lowbit
from lowbit.errors import EvidenceError, ModelError, RecipeError
from lowbit.evaluation.by_blocks import BlockScorer, dense, low_bit
from lowbit.evaluation.metrics.base import Tokens
from lowbit.evaluation.protocol import Windows
from lowbit.evaluation.scorer import Scorer
from lowbit.formats.heads import CacheFormat
from lowbit.io.compress import compress
from lowbit.io.native import Writer
from lowbit.models.pretrained import from_directory
from lowbit.models.source import of_directory
from lowbit.models.store import Files
from lowbit.pipeline.recipe import parse
from lowbit.pipeline.walk import walk

PLENTY = 64 << 30


def quantized(root: Path, recipe: str, out: Path) -> Path:
    source, parsed = of_directory(root), parse(recipe)
    with Writer(out, source, parsed, None) as sink:
        walk(source, parsed, None, sink)
        sink.finish({})
    return out


@pytest.fixture(scope="module")
def candidate(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLaMA in int4; read only."""
    return quantized(llama, "rtn:int4-g32", tmp_path_factory.mktemp("candidate") / "out")


def blocks(root: Path, memory: int = PLENTY, **options: Any) -> BlockScorer:
    return BlockScorer(dense(root), "w", memory=memory, base=0, **options)


def near(found: Tokens, expected: Tokens) -> None:
    for name, column in expected.columns().items():
        np.testing.assert_allclose(found.columns()[name], column, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["opt", "bloom", "falcon", "mistral", "mixtral"])
def test_what_is_said_in_blocks_is_what_is_said_in_memory(
    name: str, families: dict[str, Path], windows: Windows, tmp_path: Path
) -> None:
    """Original and candidate; five windows, two at a time; tied heads, learned positions, experts and all."""
    family = families[name]
    path = quantized(family, "rtn:int4-g32", tmp_path / "out")
    expected = Scorer(from_directory(family, torch.float32), "w", batch=2).reference(windows)
    reference = blocks(family, batch=2).reference(windows)
    near(reference.tokens, expected.tokens)
    torch.testing.assert_close(reference.hidden, expected.hidden, rtol=1e-5, atol=1e-5)
    whole: Any = lowbit.load(path, dtype=torch.float32, kernels="dense")
    tokens, _ = BlockScorer(low_bit(path, torch.float32), "c", memory=PLENTY, batch=2).score(windows, reference)
    near(tokens, Scorer(whole, "c", batch=2).score(windows, expected)[0])
    assert tokens.kl.mean() > 1e-4


def test_rounded_inputs_in_another_dtype(llama: Path, windows: Windows, tmp_path: Path) -> None:
    path = quantized(llama, "rtn:nf4-dq+a:int8-token", tmp_path / "out")
    reference = blocks(llama, dtype=torch.bfloat16).reference(windows)
    whole: Any = lowbit.load(path, dtype=torch.bfloat16, kernels="dense")
    tokens, provenance = BlockScorer(
        low_bit(path, torch.bfloat16), "c", memory=PLENTY, dtype=torch.bfloat16
    ).score(windows, reference)  # fmt: skip
    near(tokens, Scorer(whole, "c").score(windows, reference)[0])
    assert provenance.dtype == "bfloat16"


def test_coded_files_are_read_as_what_they_decode_to(
    llama: Path, candidate: Path, windows: Windows, tmp_path: Path
) -> None:
    for path in (llama, candidate):
        compress(path, tmp_path / path.name)
    reference = blocks(llama).reference(windows)
    near(blocks(tmp_path / llama.name).reference(windows).tokens, reference.tokens)
    found = [BlockScorer(low_bit(p, torch.float32), "c", memory=PLENTY) for p in (candidate, tmp_path / candidate.name)]
    plain, coded = (scorer.score(windows, reference)[0] for scorer in found)
    near(coded, plain)


def test_the_smallest_memory_is_named_and_keeps_hidden_states_in_files(
    llama: Path, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[int] = []
    from_file = torch.from_file

    def remember(name: str, *, size: int, **options: Any) -> torch.Tensor:
        mapped.append(size)
        return from_file(name, size=size, **options)

    monkeypatch.setattr(torch, "from_file", remember)
    expected = blocks(llama).reference(windows)
    assert not mapped
    with pytest.raises(RecipeError, match="cannot hold a block of this model") as refused:
        blocks(llama, memory=1 << 20).reference(windows)
    (least,) = map(int, re.findall(r"smallest is (\d+)MiB", str(refused.value)))
    assert blocks(llama).least(40) <= least << 20 < blocks(llama).least(40) + (1 << 20)
    found = blocks(llama, memory=blocks(llama).least(40)).reference(windows)
    assert mapped == [200 * 64, windows.scored * 64]  # what blocks pass on, and what is kept
    near(found.tokens, expected.tokens)
    assert torch.equal(found.hidden, expected.hidden)
    with pytest.raises(RecipeError):
        blocks(llama, memory=blocks(llama).least(40) - 1).reference(windows)


def test_every_weight_is_read_once(
    llama: Path, candidate: Path, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    get = Files.get

    def count(self: Files, name: str, index: int | None = None) -> torch.Tensor:
        read[name] += 1
        return get(self, name, index)

    monkeypatch.setattr(Files, "get", count)
    reference = blocks(llama).reference(windows)
    assert set(read) == set(of_directory(llama).store.names())
    twice = {name for name, times in read.items() if times > 1}
    assert twice == {"model.norm.weight"} | {n for n in read if n.startswith("model.layers.0.")}  # to see its form
    read.clear()
    BlockScorer(low_bit(candidate, torch.float32), "c", memory=PLENTY).score(windows, reference)
    assert max(read.values()) == 2


def test_the_identity_says_how_but_not_how_much(llama: Path) -> None:
    whole = Scorer(from_directory(llama, torch.float32), "w").identity
    found = blocks(llama).identity
    assert blocks(llama, memory=1 << 30).identity == found
    assert len({whole, found, blocks(llama, batch=2).identity, blocks(llama, dtype=torch.bfloat16).identity}) == 4


def test_what_cannot_be_scored_so_is_refused(
    llama: Path, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EvidenceError, match="a KV format without a chunk"):
        blocks(llama, kv=CacheFormat.parse("int4-head"))
    foreign = Path(shutil.copytree(llama, tmp_path / "foreign"))
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="lowbit import"):
        dense(foreign)
    scorer = blocks(llama)
    monkeypatch.setattr(scorer.structure.lm_head, "forward", lambda x: x.new_ones(*x.shape[:-1], VOCAB))
    with pytest.raises(ModelError, match="LlamaForCausalLM: its logits are not a linear map"):
        scorer.reference(windows)
