"""What every test may use: tiny random models of ten families, a byte-level tokenizer, and a cache of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

import libraries  # noqa: F401
import pytest
import torch
from tiny import FAMILIES, VOCAB, family_model, save_model

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["LOWBIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Bytes as tokens: 256 of them and one special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0} | {symbol: i for i, symbol in enumerate(alphabet, start=1)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """A model directory for every family of ``FAMILIES``; read only."""
    root = tmp_path_factory.mktemp("families")
    return {name: save_model(family_model(name), tokenizer, root / name) for name in FAMILIES}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest, families: dict[str, Path]) -> Path:
    """The directory of each family in turn."""
    return families[request.param]


@pytest.fixture(scope="session")
def llama(families: dict[str, Path]) -> Path:
    """The LLaMA of the families, where one model will do."""
    return families["llama"]


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Six windows of 32 random tokens."""
    return torch.randint(0, VOCAB, (6, 32), generator=torch.Generator().manual_seed(1))
