"""Tokenizers of Hugging Face as GGUF keys, and back.

Two kinds are written, as llama.cpp has them: ``gpt2`` (byte-level BPE, with the name of its pre-tokenizer) and
``llama`` (SentencePiece's BPE with bytes as fallback). ``tokenizer.huggingface.json`` holds the original, so that an
import gives back the very tokenizer; engines ignore it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError, ExportError
from lowbit.models.store import read_json

_JSON = "tokenizer.huggingface.json"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
_PARTS = {  # kinds of pre-tokenizers in order, and what llama.cpp calls them
    ("ByteLevel+regex",): "gpt-2",
    ("Digits+single", "ByteLevel+regex"): "smollm",
    ("ByteLevel+regex", "Digits+single"): "smollm",
    ("Punctuation", "ByteLevel+regex", "Digits", "Split [0-9][0-9][0-9]"): "falcon",
}
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva")
"""Pre-tokenizers of files that cut digits apart first, and then as GPT-2 does; transformers only does the latter."""


def write_tokenizer(writer: Any, folder: Path, vocab: int) -> list[str]:
    """Add the tokenizer of a directory to a ``GGUFWriter``; returns warnings. Raises ExportError for other kinds."""
    from gguf import SpecialVocab
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.exists():
        writer.add_tokenizer_model("no_vocab")
        return ["there is no tokenizer.json: llama.cpp will take tokens only"]
    raw = read_json(path)
    model = raw["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    added = {int(t["id"]): t for t in raw.get("added_tokens") or []}
    texts = {int(i): text for text, i in model["vocab"].items()} if model["type"] == "BPE" else {}
    texts |= {i: t["content"] for i, t in added.items()}
    if model["type"] != "BPE" or (max(texts) >= vocab):
        raise ExportError(
            f"a tokenizer of type {model['type']} with ids up to {max(texts, default=0)}", where=str(path),
            why=f"byte-level BPE and SentencePiece's BPE of at most {vocab} tokens are written",
        )  # fmt: skip
    warnings: list[str] = []
    whole = Tokenizer.from_file(str(path))
    spaced = whole.encode("a", add_special_tokens=False).tokens[:1] != ["a"]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(texts, merges, vocab))
        writer.add_add_space_prefix(spaced)
    else:
        name, warning = _pre(raw.get("pre_tokenizer"))
        warnings += warning
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_merges(merges or [""])
        if not merges:
            warnings.append("the tokenizer has no merges: every byte is a token")
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(vocab)])
    writer.add_token_types([_type(i, texts, added) for i in range(vocab)])
    special = SpecialVocab(folder, load_merges=False, n_vocab=vocab)
    special.merges, special.add_special_token = [], {}
    special.add_to_gguf(writer, quiet=True)
    framed = whole.encode("a").ids
    writer.add_add_bos_token(framed[:1] == [special.special_token_ids.get("bos")])
    writer.add_add_eos_token(framed[-1:] == [special.special_token_ids.get("eos")])
    writer.add_string(_JSON, json.dumps(raw, ensure_ascii=False, separators=(",", ":")))
    return warnings


def _type(i: int, texts: Mapping[int, str], added: Mapping[int, Any]) -> int:
    from gguf import TokenType

    if i not in texts:
        return int(TokenType.UNUSED)
    if i in added:
        return int(TokenType.CONTROL if added[i].get("special") else TokenType.USER_DEFINED)
    return int(TokenType.BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", texts[i]) else TokenType.NORMAL)


def _scores(texts: Mapping[int, str], merges: list[str], vocab: int) -> list[float]:
    """Scores whose order is that of merges: llama.cpp joins the pair whose whole has the highest."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), i)
    return [-float(rank.get(texts.get(i, ""), len(merges))) for i in range(vocab)]


def _pre(value: Any) -> tuple[str, list[str]]:
    """llama.cpp's name of a pre-tokenizer, by what it does; with a warning where there is none."""
    parts = value["pretokenizers"] if value and value["type"] == "Sequence" else [value] if value else []
    kinds = tuple(_part(part) for part in parts)
    if kinds in _PARTS:
        return _PARTS[kinds], []
    if len(kinds) == 2 and kinds[1] == "ByteLevel" and (name := _SPLITS.get(kinds[0].removeprefix("Split "))):
        return name, []
    return "default", [f"llama.cpp may cut words apart in another way: it has no name for pre-tokenizer {kinds}"]


def _part(part: Mapping[str, Any]) -> str:
    match part["type"]:
        case "ByteLevel":
            return "ByteLevel+regex" if part.get("use_regex", True) else "ByteLevel"
        case "Digits":
            return "Digits+single" if part.get("individual_digits") else "Digits"
        case "Split":
            return f"Split {next(iter(part['pattern'].values()))}"
        case other:
            return str(other)


def save_tokenizer(fields: Mapping[str, Any], path: Path, folder: Path) -> None:
    """The tokenizer of a file as Hugging Face has it; raises CheckpointError for one that cannot be built."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if fields.get("tokenizer.ggml.model") in (None, "no_vocab", "none"):
        return
    try:
        if isinstance(text := fields.get(_JSON), str):
            tokens = fields["tokenizer.ggml.tokens"]
            special = {f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
                       for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
                       if f"tokenizer.ggml.{key}_token_id" in fields}  # fmt: skip
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), **special)
            if isinstance(template := fields.get("tokenizer.chat_template"), str):
                tokenizer.chat_template = template
        else:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            if fields.get("tokenizer.ggml.pre") in _DIGITS:
                _cut_digits(tokenizer.backend_tokenizer)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises plain Exceptions, transformers anything
        raise CheckpointError(f"its tokenizer cannot be built: {error}", where=str(path)) from error


def _cut_digits(backend: Any) -> None:
    from tokenizers import pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
