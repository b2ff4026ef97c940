"""Libraries that lowbit imports, imported first.

The hook that checks shapes in lowbit's modules gives whatever they import a cache of bytecode that is never written, so
a library imported beneath it is compiled from source at every run: half a minute for torch and transformers.
"""

import accelerate.utils
import altair
import beartype
import pyarrow.parquet
import pydantic
import scipy.optimize
import scipy.stats
import tokenizers.implementations
import torch._dynamo
import torch.distributed.tensor
import transformers.generation.utils
import transformers.integrations
import transformers.loss.loss_utils
import transformers.models.llama.modeling_llama
import transformers.quantizers.auto
import transformers.utils.logging
from torch.distributed import fsdp


@beartype.beartype
def _first(value: int) -> int:  # beartype imports most of itself when it first checks something
    return value


__all__ = [
    "accelerate", "altair", "fsdp", "pyarrow", "pydantic", "scipy", "tokenizers", "torch", "transformers",
]  # fmt: skip
