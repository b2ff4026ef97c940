"""A model directory as a transformers model, whether its files are coded (docs/reference/container.md) or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)  # fmt: skip

from lowbit.errors import ModelError
from lowbit.models.store import Files


def from_directory(root: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a directory, as ``AutoModelForCausalLM.from_pretrained`` loads it.

    transformers opens safetensors files itself, so the tensors of coded ones are decoded here and handed over; the
    model then holds them as they are, and memory is that of the decoded files. Runs no code from the directory.
    Raises what transformers raises, ModelError and CheckpointError.
    """
    files = Files(root)
    if not files.coded:
        return AutoModelForCausalLM.from_pretrained(  # type: ignore[no-any-return]
            root, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    config = AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{type(config).__name__} is no causal language model", where=str(root))
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel = architecture.from_pretrained(None, config=config, state_dict=files.state(), dtype=dtype)
    model.name_or_path = str(root)
    if (root / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(root, local_files_only=True)
    return model
