"""GGUF files: converted once into a Hugging Face directory in the cache, through transformers and ``gguf``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lowbit import digest
from lowbit.codec.container import Reader, is_coded
from lowbit.codec.identity import of_decoded
from lowbit.errors import ModelError, StorageError
from lowbit.models.gguf_header import check_header


def convert(path: Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """The directory that holds the dequantized model of a GGUF file, made on first use.

    Weights become float16: GGUF scales are float16, so this keeps eight times more of their precision than
    bfloat16 at the same size. Needs memory for the model in float32 once.
    """
    if not path.is_file():
        raise ModelError("does not exist", where=str(path), fix="the path of a .gguf file")
    target = digest.cache_folder() / "models" / f"{path.stem}-{digest.short(of_decoded(path))}"
    if (target / "config.json").exists():
        return target  # the name holds the file's digest: it was checked when it was converted
    path = plain(path)
    check(path)
    say(f"converting {path.name} once into {target}")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        folder, name = str(path.parent), path.name
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, local_files_only=True
        )
        # A model loaded from GGUF refuses to be saved; the same weights in a fresh one do not.
        settings = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
        config = AutoConfig.for_model(**settings)
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        del loaded
        model.half().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(target)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(f"transformers cannot convert it: {error}", where=str(path)) from error
    except OSError as error:
        if (target / "config.json").exists():  # another process was faster
            return target
        raise StorageError(f"cannot write the converted model: {error}", where=str(target)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def plain(path: Path) -> Path:
    """The GGUF file itself, or what a coded one decodes to, in the cache; raises CheckpointError for damaged ones."""
    if not is_coded(path):
        return path
    target = digest.cache_folder() / "models" / f"{path.stem}-{digest.short(of_decoded(path))}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
        try:
            with Reader(path) as reader, partial.open("wb") as out:
                for piece in reader.plain():
                    out.write(piece.data)
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def check(path: Path) -> None:
    """Raises ModelError unless the file is a whole GGUF file whose tensors lie within it."""
    from gguf import GGUFReader

    check_header(path)
    try:
        reader = GGUFReader(path)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
        if end > path.stat().st_size:
            raise ValueError(f"tensors end at byte {end}, the file at {path.stat().st_size}")
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ModelError(
            f"is no whole GGUF file: {error}", where=str(path),
            why="it was cut short or altered", fix="download or copy it again",
        )  from error  # fmt: skip
