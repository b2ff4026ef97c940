"""A recipe as the TOML text that :func:`lowbit.pipeline.recipe.parse` reads back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lowbit.pipeline.recipe import Recipe


def toml(recipe: Recipe) -> str:
    """The recipe's TOML; what has its default is left out. A calibration seed of None has no spelling in TOML."""
    held = recipe.model_dump(exclude_defaults=True, exclude_none=True)
    plain = {key: value for key, value in held.items() if not isinstance(value, dict | list)}
    parts = [_lines(plain)] if plain else []
    for key, value in held.items():
        if isinstance(value, dict):
            parts.append(f"[{key}]\n{_lines(value)}")
        elif isinstance(value, list):
            parts += [f"[[{key}]]\n{_lines(entry)}" for entry in value]
    return "\n\n".join(parts) + "\n"


def _lines(table: Mapping[str, Any]) -> str:
    return "\n".join(f"{key} = {_value(value)}" for key, value in table.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_value(v)}" for key, v in value.items()) + " }"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
