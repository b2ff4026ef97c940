"""Other ecosystems' low-bit files as QTensors: the same codes, nothing rounded, and nothing believed unchecked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from lowbit import digest
from lowbit.arrays import Tensor
from lowbit.errors import CheckpointError, ExportError, FormatError, ModelError
from lowbit.formats.activation import ActivationFormat, Input
from lowbit.formats.blocks import ALL
from lowbit.formats.qtensor import QTensor
from lowbit.formats.spec import Spec
from lowbit.io.hubnames import HubNames, Part
from lowbit.io.interchange import registry
from lowbit.io.interchange.base import Layout
from lowbit.io.interchange.rows import stack_rows
from lowbit.io.native import copy_companions
from lowbit.io.opening import REST, Group, LowBit, plain_config, skeleton
from lowbit.models.graph import Site, outside_blocks, stored
from lowbit.models.source import Source
from lowbit.models.store import Files, Memory, read_json


def open_foreign(root: Path) -> LowBit:
    """A directory with a ``quantization_config`` of a known ecosystem; raises CheckpointError and ModelError."""
    raw = read_json(root / "config.json").get("quantization_config")
    if raw is None and (root / "quantize_config.json").is_file():  # where GPTQ files had it before transformers did
        raw = {"quant_method": "gptq", **read_json(root / "quantize_config.json")}
    if raw is None:
        raise ModelError(
            "holds no low-bit weights", where=str(root), why="its config.json has no quantization_config",
            fix=f"lowbit quantize {root} RECIPE -o OUT",
        )  # fmt: skip
    if not isinstance(raw, dict):
        raise CheckpointError("quantization_config is no table", where=str(root / "config.json"))
    layout = registry.of_config(raw, str(root / "config.json"))
    try:
        files = Files(root)
    except ModelError as error:
        raise CheckpointError(error.what, where=error.where, why=error.why, fix=error.fix) from error
    config = plain_config(root)
    reader = _Directory(skeleton(root.resolve().name, config, files, root), files, layout)
    specs, inputs, added = _specs(reader.groups())
    if not specs:
        raise CheckpointError("holds no low-bit linear", where=str(root), why="its quantization_config says it does")
    reader.require_all_read()
    return LowBit(
        root, layout.name, f"imported:{layout.name}", digest.of_value([raw, reader.source.digest]), reader.source,
        config, specs, inputs, None, reader.groups, lambda folder: copy_companions(root, folder), added, layout.notes(),
    )  # fmt: skip


def open_gguf(path: Path) -> LowBit:
    """A GGUF file; tensors that are no linears of a block are held in memory. Raises CheckpointError."""
    from lowbit.io.gguf.read import read

    model = read(path)
    dense: dict[str, Tensor] = {}
    specs: dict[str, Spec] = {}
    for name, value in model.tensors():
        if isinstance(value, QTensor):
            specs[name.removesuffix(".weight")] = value.spec()
        else:
            dense[name] = value
    source = skeleton(path.stem, model.config, Memory(dense), None)
    return LowBit(
        path, "gguf", "imported:gguf", digest.of_file_cached(path), source, model.config, specs, {}, None,
        lambda: _gguf_groups(model.tensors(), source, set(specs)), model.companions, warnings=tuple(model.warnings),
    )  # fmt: skip


class _Directory:
    """The linears of a model as a layout's files hold them."""

    def __init__(self, source: Source, files: Files, layout: Layout) -> None:
        self.source, self._files, self._layout = source, files, layout
        self._names, self._hub = set(files.names()), HubNames(source)
        self._read: set[str] = set()

    def groups(self) -> Iterator[Group]:
        source = self.source
        for block in source.blocks:
            held = [(f"{block}.{name}", tensor) for name, tensor in stored(source.skeleton.get_submodule(block))]
            yield self._group(block, source.sites(block), held)
        yield self._group(REST, source.head_sites(), list(outside_blocks(source.skeleton, source.blocks)))

    def require_all_read(self) -> None:
        """Raises CheckpointError when codes were left over: they belong to no linear of this model."""
        marks = tuple(f".{suffix}" for suffix in self._layout.suffixes - {"weight", "bias"})
        if left := sorted(name for name in self._names - self._read if name.endswith(marks)):
            raise CheckpointError(
                f"{len(left)} tensors belong to no linear of the model", where=f"{self._files.root}: {left[0]}",
                why="its configuration is of another model, or its names are of a layout that lowbit does not know",
            )  # fmt: skip

    def _group(self, name: str, sites: list[Site], held: list[tuple[str, Tensor]]) -> Group:
        codes: dict[str, QTensor] = {}
        inputs: dict[str, Input] = {}
        dense: dict[str, Tensor] = {}
        for site in sites:
            if parts := self._parts(site.name):
                codes[site.name], rounding = self._unpack(site, parts)
                if rounding is not None:
                    inputs[site.name] = rounding
        for full, tensor in held:
            if full.removesuffix(".weight") not in codes and (
                isinstance(tensor, torch.nn.Parameter) or self._has(full)
            ):
                dense[full] = self._dense(full, tensor)
        added = {f"{site.name}.bias": bias for site in sites if (bias := self._added_bias(site, codes)) is not None}
        return Group(name, codes, inputs, dense | added, frozenset(added))

    def _has(self, name: str) -> bool:
        return self.source.has(name)

    def _dense(self, name: str, like: Tensor) -> Tensor:
        value = self.source.tensor(name, tuple(like.shape))
        if not value.is_floating_point() and like.is_floating_point():
            raise CheckpointError(
                f"is {str(value.dtype).removeprefix('torch.')} without scales", where=name,
                why="neither plain weights nor those of the layout that config.json names",
            )  # fmt: skip
        return value

    def _parts(self, site: str) -> list[Part]:
        """The linears of files that hold the codes of a linear; none when it has a plain weight."""
        base = self.source.skeleton.base_model_prefix + "."
        try:
            spelled = self._hub.parts(site)
        except ExportError:  # files of this family hold it together with others, so not as codes
            spelled = []
        for parts in (spelled, [Part(site, ALL)], [Part(site.removeprefix(base), ALL)]):
            if parts and all(self._coded(part.site) for part in parts):
                return parts
        return []

    def _coded(self, site: str) -> bool:
        return any(f"{site}.{suffix}" in self._names for suffix in self._layout.suffixes - {"weight", "bias"})

    def _unpack(self, site: Site, parts: list[Part]) -> tuple[QTensor, Input | None]:
        found: list[QTensor] = []
        rounding: Input | None = None
        for part in parts:
            names = {f"{part.site}.{suffix}": suffix for suffix in self._layout.suffixes}
            present = {suffix: self._files.get(name) for name, suffix in names.items() if name in self._names}
            self._read |= names.keys() & self._names
            rows = len(range(*part.rows.indices(site.shape[0])))
            try:
                q, rounding = self._layout.unpack(part.site, (rows, site.shape[1]), present)
            except FormatError as error:
                raise CheckpointError(error.what, where=f"{part.site}: {error.where}", why=error.why) from error
            if q.shape != (rows, site.shape[1]):
                raise CheckpointError(f"holds {q.shape}, the model has {(rows, site.shape[1])}", where=part.site)
            found.append(q)
        try:
            return stack_rows(found), rounding
        except FormatError as error:
            raise CheckpointError(error.what, where=site.name, why="the model multiplies by both at once") from error

    def _added_bias(self, site: Site, codes: Mapping[str, QTensor]) -> Tensor | None:
        """A bias that the file has and the model lacks; packers write zeros for every linear, which mean nothing."""
        name = f"{site.name}.bias"
        if site.bias or site.name not in codes or not self._has(name):
            return None
        bias = self.source.tensor(name, (site.shape[0],))
        return bias if bool(bias.any()) else None


def _specs(groups: Iterator[Group]) -> tuple[dict[str, Spec], dict[str, ActivationFormat], frozenset[str]]:
    """What is in all groups: specs, how inputs are rounded, and biases that the model lacks."""
    specs: dict[str, Spec] = {}
    inputs: dict[str, ActivationFormat] = {}
    added: set[str] = set()
    for group in groups:
        added |= group.edited
        specs |= {site: q.spec() for site, q in group.codes.items()}
        inputs |= {site: i.format for site, i in group.inputs.items()}
    return specs, inputs, frozenset(added)


def _gguf_groups(tensors: Iterator[tuple[str, Any]], source: Source, expected: set[str]) -> Iterator[Group]:
    """Blocks in order, each as soon as its codes and those of the blocks before have come."""
    block_of = {site.name: block for block in source.blocks for site in source.sites(block)}
    order = [*source.blocks, REST]
    missing = {name: {site for site in expected if block_of.get(site, REST) == name} for name in order}
    held: dict[str, dict[str, QTensor]] = {name: {} for name in order}
    for name, value in tensors:
        if isinstance(value, QTensor):
            site = name.removesuffix(".weight")
            held[block_of.get(site, REST)][site] = value
            while len(order) > 1 and held[order[0]].keys() == missing[order[0]]:
                yield _gguf_group(order[0], held.pop(order.pop(0)), source)
    yield from (_gguf_group(name, held[name], source) for name in order)


def _gguf_group(block: str, codes: Mapping[str, QTensor], source: Source) -> Group:
    module = source.skeleton.get_submodule(block) if block else None
    names = (
        [f"{block}.{name}" for name, _ in stored(module)] if module is not None
        else [name for name, _ in outside_blocks(source.skeleton, source.blocks)]
    )  # fmt: skip
    known = cast(Memory, source.store).state
    dense = {n: known[n] for n in names if n.removesuffix(".weight") not in codes and n in known}
    return Group(block, codes, {}, dense)
