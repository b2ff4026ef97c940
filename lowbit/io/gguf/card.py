"""What a file says of its model as a work (license, languages, author), as the card of a Hugging Face directory.

The keys ``general.*`` of GGUF lie in a directory as the YAML at the head of its README.md, where the hub and
llama.cpp's converter look for them. What a card says beyond that is not for engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = "README.md"
_TEXTS = {
    "name": "name", "author": "author", "version": "version", "organization": "organization", "finetune": "finetune",
    "basename": "basename", "size_label": "size_label", "description": "description", "license": "license",
    "license.name": "license_name", "license.link": "license_link", "url": "url", "source.url": "source_url",
}  # fmt: skip
_LISTS = {"tags": "tags", "languages": "language"}
_MAX_CARD, _MAX_TEXT, _MAX_ENTRIES = 1 << 20, 1 << 14, 1 << 10


def write_card(writer: Any, folder: Path, name: str) -> list[str]:
    """Add what the card in a directory says to a ``GGUFWriter``, ``name`` where it has none; returns warnings."""
    said, warnings = _read(folder / CARD)
    for key, field in _TEXTS.items():
        if text := ",".join(_texts(said.get(field))) or (name if key == "name" else ""):
            writer.add_string(f"general.{key}", text)
    for key, field in _LISTS.items():
        if texts := _texts(said.get(field)):
            writer.add_array(f"general.{key}", texts)
    return warnings


def save_card(fields: Mapping[str, Any], folder: Path) -> None:
    """Write what an untrusted file says into a card; nothing where it says nothing."""
    from huggingface_hub import metadata_save

    said: dict[str, Any] = {}
    for key, name in _TEXTS.items():
        if isinstance(value := fields.get(f"general.{key}"), str) and (texts := _texts(value)):
            said[name] = texts[0]
    for key, name in _LISTS.items():
        if isinstance(value := fields.get(f"general.{key}"), list) and (texts := _texts(value)):
            said[name] = texts
    if said:
        metadata_save(folder / CARD, said)


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The head of a card, empty where there is none, and a warning where it cannot be read."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    if not path.is_file():
        return {}, []
    try:
        if path.stat().st_size > _MAX_CARD:
            raise ValueError(f"it has more than {_MAX_CARD} bytes")
        return metadata_load(path) or {}, []
    except (YAMLError, ValueError, RecursionError) as error:
        why = str(error).partition("\n")[0]
        return {}, [f"the file does not say the model's license: {CARD} cannot be read ({why})"]


def _texts(value: Any) -> list[str]:
    """The texts of a value that is one, or a list of some; numbers (a version of 1.0) are texts to YAML's users."""
    found = value if isinstance(value, list) else [value]
    texts = [str(v) for v in found[:_MAX_ENTRIES] if isinstance(v, str | int | float) and type(v) is not bool]
    return [text for text in texts if 0 < len(text) <= _MAX_TEXT]
