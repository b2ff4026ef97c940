"""A model to run, from what a command was given: where it is, its tokenizer, and how its cache is kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from lowbit.cli.options import say

if TYPE_CHECKING:
    from lowbit.formats.heads import CacheFormat

Kernels = Annotated[
    Literal["auto", "reference", "dense"],
    typer.Option("--kernels", help="dense decodes all weights once: faster, with the memory of the original."),
]
KV = Annotated[
    str | None,
    typer.Option("--kv", metavar="FORMAT", help="Keys and values in few bits (int4-head); default: as OUT says."),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Hold no more than this, Python included (512MiB); blocks beyond it are read at every token.",
    ),
]


class Opened(NamedTuple):
    """A ``PreTrainedModel`` and its tokenizer; ``kv`` None keeps keys and values as they are."""

    model: Any
    tokenizer: Any
    kv: CacheFormat | None
    longest: int | None
    """Tokens that the model reads at most, where its configuration says so."""


class Described(NamedTuple):
    """A model that is there and fits its options, before its weights are read."""

    path: Path
    tokenizer: Any
    kv: CacheFormat | None
    """As asked for; the checkpoint may have its own."""
    longest: int | None
    """Tokens that the model reads at most, where its configuration says so."""
    dtype: str
    kernels: str
    memory: int | None

    def load(self, tokens: int) -> Opened:
        """Its weights, for texts of ``tokens``, or as many as it reads if that is less. Raises CheckpointError."""
        from lowbit.io import native
        from lowbit.runtime.decoding import prepare
        from lowbit.runtime.facade import cache_format, load
        from lowbit.study.stages import dense_model, torch_dtype

        if native.is_native(self.path):
            tokens = tokens if self.longest is None else min(tokens, self.longest)
            model = load(
                self.path, dtype=torch_dtype(self.dtype), kernels=self.kernels, memory=self.memory, tokens=tokens
            )  # fmt: skip
        else:
            model = dense_model(self.path, self.dtype)
        if self.kernels == "auto":
            prepare(model)
        return Opened(model, self.tokenizer, self.kv or cache_format(model), self.longest)


def described(name: str, dtype: str, kernels: str, kv: str | None, memory: str | None) -> Described:
    """Find a native checkpoint, or any model, and read its tokenizer and configuration.

    Raises RecipeError for options that mean nothing here, and ModelError.
    """
    from transformers import AutoConfig, AutoTokenizer

    from lowbit.errors import ModelError, RecipeError
    from lowbit.formats.heads import CacheFormat
    from lowbit.io import native
    from lowbit.models.resolve import locate
    from lowbit.pipeline.allocate import size

    asked = None if kv is None else CacheFormat.parse(kv)
    limit = None if memory is None else size(memory)
    path = locate(name, say)
    if limit is not None and not native.is_native(path):
        raise RecipeError("--memory is of low-bit checkpoints", where=name, fix="lowbit quantize it first")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"its tokenizer or configuration cannot be read: {error}", where=str(path)) from error
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return Described(path, tokenizer, asked, longest, dtype, kernels, limit)


def opened(name: str, dtype: str, kernels: str, kv: str | None, memory: str | None, tokens: int) -> Opened:
    """``described`` and loaded, where the length of the texts is known before its tokenizer is."""
    return described(name, dtype, kernels, kv, memory).load(tokens)
