"""Low-bit models of every family without a walk, for tests of what becomes of them in files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import family_model

from lowbit.arrays import Tensor
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import QTensor
from lowbit.io.gguf.write import write
from lowbit.io.opening import REST, Group, LowBit
from lowbit.models.graph import matrix, outside_blocks, sites_of, stored
from lowbit.models.source import of_model


def low_bit(model: Any, name: str = "int4-g32-sym", root: Path | None = None) -> LowBit:
    """Every linear of the blocks in a format, everything else as it is; tokenizer files from ``root``."""
    source, fmt = of_model(model), preset(name)

    def groups() -> Iterator[Group]:
        for block in source.blocks:
            module = source.load(block, torch.float32)
            codes: dict[str, QTensor] = {}
            for site in sites_of(module, block):
                w = matrix(module.get_submodule(site.name[len(block) + 1 :])).detach()
                codes[site.name] = fmt.encode(w, fmt.fit(w))
            rest = {f"{block}.{n}": t.detach() for n, t in stored(module)}
            yield Group(block, codes, {}, {n: t for n, t in rest.items() if n.removesuffix(".weight") not in codes})
        outside = outside_blocks(source.skeleton, source.blocks)
        yield Group(REST, {}, {}, {n: source.tensor(n, tuple(t.shape)) for n, t in outside})

    def companions(folder: Path) -> None:
        for file in () if root is None else root.glob("*token*"):
            (folder / file.name).write_bytes(file.read_bytes())

    config = source.config.to_dict()
    return LowBit(Path("tiny"), "lowbit", f"rtn:{name}", "digest", source, config, {}, {}, None, groups, companions)


def family(model_type: str, name: str = "int4-g32-sym", root: Path | None = None, **changes: Any) -> LowBit:
    return low_bit(family_model(model_type, **changes), name, root)


FORMATS = {
    "llama": "q4_1", "mistral": "q5_0", "mixtral": "int4-g32-sym", "falcon": "q5_1", "bloom": "q4_0", "gpt2": "q8_0",
    "gpt_neox": "int3-g64", "stablelm": "int5-g64-sym", "gemma": "mxfp4",
}  # fmt: skip
"""A format a family, of every block type that rows of 64 allow."""


class Written(NamedTuple):
    """A model and the file that it became."""

    model: LowBit
    path: Path


_WRITTEN: dict[str, Written] = {}


def written(model_type: str, factory: pytest.TempPathFactory) -> Written:
    """One file a family, made once; read only."""
    if model_type not in _WRITTEN:
        made = Written(family(model_type, FORMATS[model_type]), factory.mktemp(model_type) / "model.gguf")
        write(*made)
        _WRITTEN[model_type] = made
    return _WRITTEN[model_type]


def values_of(model: LowBit) -> dict[str, Tensor]:
    """Every parameter, decoded."""
    found: dict[str, Tensor] = {}
    for group in model.groups():
        found |= {f"{site}.weight": q.decode() for site, q in group.codes.items()}
        found |= {name: value.to(torch.float32) for name, value in group.dense.items()}
    return found
