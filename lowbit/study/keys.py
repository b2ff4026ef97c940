"""The identity of a cell: what it computes, from what, and with which source code; never a name or a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowbit import digest
from lowbit.errors import StudyError

_CODE = frozenset({".py", ".so", ".pyd"})


def cell_key(stage: str, inputs: Sequence[str], params: Mapping[str, Any], code_version: str) -> str:
    """Hex sha256 of the canonical JSON of all that decides a result.

    ``inputs`` are the keys (or content digests) of what the cell reads, in order; ``params`` is a JSON object, whose
    own order does not matter. Raises `StudyError` for parameters that JSON cannot spell, NaN and infinity among them.
    """
    identity = {"stage": stage, "inputs": list(inputs), "params": dict(params), "code": code_version}
    return digest.of_bytes(spelled(identity, where=f"stage {stage!r}").encode())


def spelled(value: object, *, where: str) -> str:
    """Canonical JSON of ``value``; a `StudyError` that names ``where`` when JSON cannot hold it."""
    try:
        return digest.canonical(value)
    except (TypeError, ValueError) as error:
        raise StudyError(
            f"not a JSON value: {error}",
            where=where,
            why="Parameters and outputs are stored and hashed as JSON, so that any process reads the same.",
            fix="numbers, strings, booleans, None, lists and dicts; put arrays and NaN into the evidence folder.",
        ) from error


@cache
def code_version(*modules: str) -> str:
    """Hex sha256 over the source of ``modules``: full dotted names of modules, or of packages with all below them.

    Imports nothing. One reading per process: the modules in memory do not change either. About 1 ms per 100 files.
    Raises `StudyError` for a name without source files.
    """
    files = {path.as_posix(): digest.of_file(file) for name in modules for path, file in _sources(name)}
    return digest.of_value(files)


def _sources(name: str) -> Iterator[tuple[Path, Path]]:
    """Each code file of a module or package: its path below the import root, and where it lies now."""
    top, *rest = name.split(".")
    spec = find_spec(top) if top not in ("", "__main__") else None
    if spec and spec.submodule_search_locations:
        places = [Path(folder) for folder in spec.submodule_search_locations]
    elif spec and spec.origin and not rest:
        places = [Path(spec.origin).with_suffix("")]
    else:
        places = []
    found = False
    for place in places:
        target, root = place.joinpath(*rest), place.parent
        below = target.rglob("*") if target.is_dir() else target.parent.glob(f"{target.name}.*")
        for file in below:
            if file.suffix in _CODE and file.is_file():
                found = True
                yield file.relative_to(root), file
    if not found:
        raise StudyError(
            "no source files",
            where=f"code of a stage: {name!r}",
            why="A result is cached under the digest of the code that made it.",
            fix="the full name of an importable module or package, such as 'lowbit.methods'.",
        )
