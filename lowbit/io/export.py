"""A low-bit model in another ecosystem's files, ready for its loaders: shards, configuration, tokenizer, provenance.

    out/model.safetensors              or model-0000i-of-0000n.safetensors with their index
    out/config.json                    the model's, with the ecosystem's quantization_config
    out/tokenizer*, generation_config.json, ...
    out/lowbit.export.json             what it was made from, and how

Nothing is rounded: a layout holds the codes as they are, or the export is refused and nothing appears.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lowbit
from lowbit.arrays import Tensor
from lowbit.errors import ExportError, FormatError
from lowbit.formats.activation import ActivationFormat
from lowbit.formats.spec import Spec
from lowbit.io.biases import with_biases
from lowbit.io.folder import require_free, whole_folder
from lowbit.io.hubnames import HubNames
from lowbit.io.interchange import registry
from lowbit.io.interchange.base import Layout, LayoutClass, LowBitModel
from lowbit.io.interchange.dense import Dense
from lowbit.io.interchange.rows import hollow, take_rows
from lowbit.io.opening import Group, LowBit
from lowbit.io.storage import NOTHING_LEFT, storage, write_json, write_tensors
from lowbit.models.graph import is_linear, matrix
from lowbit.models.store import INDEX, SINGLE

PROVENANCE = "lowbit.export.json"
SHARD = 4 << 30
_NARROW = "scales are float16 and the model is bfloat16: an engine that computes in bfloat16 rounds them to 8 bits"
_SHOWN = 3


@dataclass(frozen=True)
class Exported:
    """What was written."""

    out: Path
    layout: str
    nbytes: int
    """Of all weight files."""
    sites: int
    """Linears of the model that have codes."""
    notes: tuple[str, ...] = ()
    """What the files cannot say of the model."""
    warnings: tuple[str, ...] = ()
    """Engines that will not load them, and why."""


def export(
    model: LowBit, to: str, out: Path, *, shard_bytes: int = SHARD,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Exported:  # fmt: skip
    """Write ``model`` in the layout ``to`` (a name of :mod:`lowbit.io.interchange.registry`) into a new directory.

    Memory: one block and one shard of at most ``shard_bytes``. ``on_progress`` is told of blocks. Raises ExportError
    naming the linears that the layout cannot hold and the nearest layout that can, StorageError for ``out``.
    """
    require_free(out)
    names = HubNames(model.source)
    layout = planned(model, names, registry.layout(to))
    biases = with_biases(model.source, model.config, model.added)
    with whole_folder(out) as folder, storage(out, NOTHING_LEFT):
        model.companions(folder)
        shards = _Shards(folder, shard_bytes)
        for done, group in enumerate(model.groups()):
            held = {n: t for n, t in biases.zeros.items() if n.startswith(group.name + ".") and group.name}
            shards.add(_tensors(model, names, layout, replace(group, dense={**group.dense, **held})))
            on_progress(done + 1, len(model.source.blocks) + 1)
        nbytes = shards.finish()
        notes = layout.notes() + ((_NARROW,) if shards.dtype == "bfloat16" and shards.half_scales else ())
        for name, value in layout.files().items():
            write_json(folder / name, value)
        write_json(folder / PROVENANCE, provenance(model, layout.name, notes, out))
        write_json(folder / "config.json", _config(biases.config, layout, shards.dtype))
    return Exported(out, layout.name, nbytes, len(model.specs), notes)


def planned(model: LowBit, names: HubNames, cls: LayoutClass) -> Layout:
    """The layout with settings for this model; raises ExportError naming what it cannot hold, and what can."""
    if issubclass(cls, Dense):
        return cls.for_model(described(model, model.specs, model.inputs))
    specs, inputs = file_specs(model, names), file_inputs(model, names)
    refused = _refused(cls, specs, inputs)
    if refused:
        first = sorted(refused)[:_SHOWN]
        more = f", and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        able = next((n for n in registry.LOW_BIT if n != cls.name and _able(n, specs, inputs)), "bf16")
        fixes = Counter(fix for _, fix in refused.values() if fix and fix != f"--to {able}")
        raise ExportError(
            f"cannot hold {len(refused)} of {len(specs)} linears: " + ", ".join(first) + more, where=cls.name,
            why="; ".join(dict.fromkeys(why for why, _ in refused.values())),
            fix=f"--to {able}" + (f", or {fixes.most_common(1)[0][0]}" if fixes else ""),
        )  # fmt: skip
    return cls.for_model(described(model, specs, inputs))


def described(model: LowBit, specs: Mapping[str, Spec], inputs: Mapping[str, ActivationFormat]) -> LowBitModel:
    """What layouts are told of a model."""
    return LowBitModel(type(model.source.skeleton).__name__, specs, dense_sites(model), inputs, model.kv)


def dense_sites(model: LowBit) -> tuple[str, ...]:
    """Linears of the model, as files name them, that have no codes; the head counts, also where it is tied.

    A head goes by the model's name as well: GPT-NeoX files say ``embed_out``, and transformers looks for ``lm_head``.
    """
    names, found = HubNames(model.source), []
    inside = tuple(f"{block}." for block in model.source.blocks)
    for name, module in model.source.skeleton.named_modules():
        if is_linear(module) and name not in model.specs:
            try:
                found += [part.site for part in names.parts(name)]
            except ExportError:
                found.append(name)
            if not name.startswith(inside):
                found.append(name)
    return tuple(dict.fromkeys(found))


def file_specs(model: LowBit, names: HubNames) -> dict[str, Spec]:
    """By the name that files use: the specs of the linears that have codes. Raises ExportError."""
    found = {}
    for site, spec in model.specs.items():
        parts = names.parts(site)
        for part in parts:
            try:
                found[part.site] = spec if len(parts) == 1 else take_rows(hollow(spec), part.rows).spec()
            except FormatError as error:
                raise ExportError(
                    error.what, where=site, why="files hold gate and up apart", fix="--to bf16"
                ) from error
    return found


def file_inputs(model: LowBit, names: HubNames) -> dict[str, ActivationFormat]:
    """By the name that files use: how inputs are rounded."""
    return {part.site: fmt for site, fmt in model.inputs.items() for part in names.parts(site)}


def _refused(
    cls: LayoutClass, specs: Mapping[str, Spec], inputs: Mapping[str, ActivationFormat]
) -> dict[str, tuple[str, str]]:
    """Linears that a layout cannot hold: why, and what to do about it."""
    known: dict[tuple[Spec, ActivationFormat | None], Any] = {}
    refused = {}
    for site, spec in specs.items():
        key = (spec, inputs.get(site))
        if key not in known:
            known[key] = cls.refusal(*key)
        if known[key] is not None:
            refused[site] = (known[key].why, known[key].fix)
    return refused


def _able(name: str, specs: Mapping[str, Spec], inputs: Mapping[str, ActivationFormat]) -> bool:
    return not _refused(registry.layout(name), specs, inputs)


def _tensors(model: LowBit, names: HubNames, layout: Layout, group: Group) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a group under the names of files."""
    plain = dict(group.dense)
    for site, q in group.codes.items():
        if isinstance(layout, Dense):
            plain[f"{site}.weight"] = _as_stored(model, site, layout.pack(site, q)["weight"])
            continue
        for part in names.parts(site):
            packed = layout.pack(part.site, take_rows(q, part.rows), group.inputs.get(site))
            yield from ((f"{part.site}.{suffix}", tensor) for suffix, tensor in packed.items())
    for name, tensor in names.tensors(plain).items():
        cast = isinstance(layout, Dense) and tensor.is_floating_point()
        yield name, tensor.to(layout.dtype) if cast and isinstance(layout, Dense) else tensor


def _as_stored(model: LowBit, site: str, weight: Tensor) -> Tensor:
    """A matrix (out, in) the way the model's own module keeps it: ``Conv1D`` keeps the transpose."""
    module = model.source.skeleton.get_submodule(site)
    return weight if matrix(module) is module.weight else weight.t()


def _config(plain: Mapping[str, Any], layout: Layout, dtype: str) -> dict[str, Any]:
    config = {**plain, "dtype": dtype, "torch_dtype": dtype}  # its name now, and in older loaders
    held = layout.config()
    return {**config, "quantization_config": held} if held else config


def provenance(model: LowBit, layout: str, notes: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """What ``lowbit.export.json`` in ``folder`` says: what the files were made from, and how."""
    return {
        "lowbit": lowbit.__version__, "layout": layout, "recipe": model.recipe, "notes": list(notes),
        "source": {"path": os.path.relpath(model.path, folder), "origin": model.origin, "digest": model.digest},
    }  # fmt: skip


class _Shards:
    """Tensors into files of bounded size; their number is known at the end, and then their names."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._held: dict[str, Tensor] = {}
        self._size, self._total = 0, 0
        self._written: list[list[str]] = []
        self._dtypes: Counter[str] = Counter()
        self.half_scales = False

    @property
    def dtype(self) -> str:
        """The dtype of most plain numbers."""
        return self._dtypes.most_common(1)[0][0] if self._dtypes else "float16"

    def add(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if self._held and self._size + size > self._limit:
                self._flush()
            # one storage a tensor: safetensors refuses shared ones, and a view would keep all of it
            self._held[name] = tensor.contiguous() if tensor.is_contiguous() and not tensor._is_view() else _own(tensor)
            self._size, self._total = self._size + size, self._total + size
            if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32) and name.endswith("weight"):
                self._dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
            self.half_scales |= tensor.dtype == torch.float16 and name.endswith(("scales", "weight_scale"))

    def finish(self) -> int:
        """Write what is left, give the files their names, and the index; the bytes of all."""
        self._flush()
        count = len(self._written)
        weight_map: dict[str, str] = {}
        for i, held in enumerate(self._written):
            name = SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._path(i).rename(self._folder / name)
            weight_map |= dict.fromkeys(held, name)
        if count > 1:
            write_json(self._folder / INDEX, {"metadata": {"total_size": self._total}, "weight_map": weight_map})
        return sum(path.stat().st_size for path in self._folder.glob("*.safetensors"))

    def _flush(self) -> None:
        write_tensors(self._path(len(self._written)), self._held, {"format": "pt"})
        self._written.append(list(self._held))
        self._held, self._size = {}, 0

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number}.safetensors"


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
