"""Writing a low-bit model as one GGUF file, tensor by tensor."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from lowbit.arrays import Tensor, UInt8
from lowbit.errors import ExportError, StorageError, nearest
from lowbit.formats.blocks import Block
from lowbit.formats.pack import Codes
from lowbit.formats.qtensor import Affine, QTensor, Raw
from lowbit.io.gguf.blocks import pack, smallest
from lowbit.io.gguf.card import write_card
from lowbit.io.gguf.fields import KINDS
from lowbit.io.gguf.metadata import Written, keys_of
from lowbit.io.gguf.names import Names, Place
from lowbit.io.gguf.tokenizer import write_tokenizer
from lowbit.io.opening import Group, LowBit
from lowbit.io.storage import NOTHING_LEFT, partial_file, storage

DENSE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_FLOAT32 = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight")
"""Ends of names that llama.cpp wants in float32, like everything of one dimension."""
_FILE_TYPES = {"q2_k": "MOSTLY_Q2_K", "q3_k": "MOSTLY_Q3_K_M", "q4_k": "MOSTLY_Q4_K_M", "q5_k": "MOSTLY_Q5_K_M",
               "mxfp4": "MOSTLY_MXFP4_MOE", "f32": "ALL_F32"}  # fmt: skip


class Rows(NamedTuple):
    """A tensor as a GGUF type and the bytes of each of its rows (of each number, for one dimension)."""

    kind: str
    data: UInt8[Tensor, "rows bytes"]


def kinds() -> tuple[str, ...]:
    """What ``gguf:KIND`` may name."""
    return (*KINDS, *DENSE)


def write(model: LowBit, out: Path, kind: str | None = None) -> list[str]:
    """Write ``model`` to the file ``out``; returns warnings. See :mod:`lowbit.io.gguf` for ``kind``.

    Nothing is rounded but by ``f16`` and ``bf16``. Raises ExportError for what GGUF or llama.cpp cannot hold, and
    StorageError. Memory: one block of the model. Disk: twice the file while it is written, beside ``out``.
    """
    from gguf import GGUFWriter, LlamaFileType

    if kind is not None and kind not in kinds():
        raise ExportError(f"unknown GGUF type {kind!r}", fix=nearest(kind, kinds()))
    if os.path.lexists(out):
        raise StorageError("exists", where=str(out), why="nothing is overwritten", fix="another -o")
    head = keys_of(model.source.config, _inverse_frequencies(model))
    names = Names(model.source)
    warnings = [*head.warnings, *_unsaid(model)]
    with (
        storage(out, NOTHING_LEFT),
        partial_file(out, shared=True) as partial,
        tempfile.TemporaryFile(dir=out.parent) as spool,
        tempfile.TemporaryDirectory() as companions,
    ):
        writer = GGUFWriter(partial, names.family.arch, use_temp_file=True)
        writer.temp_file = cast(Any, spool)  # its own would be in $TMPDIR, which is often memory
        try:
            writer.add_type("model")
            model.companions(Path(companions))
            warnings += write_card(writer, Path(companions), model.path.stem)
            writer.add_quantization_version(2)
            _add_keys(writer, names.family.arch, head)
            warnings += write_tokenizer(writer, Path(companions), model.source.config.vocab_size)
            written: Counter[str] = Counter()
            missing = {place.name for places in names.places.values() for place in places}
            for group in model.groups():
                for name, rows, shape in _tensors(group, names, kind):
                    _add(writer, name, rows, shape)
                    written[rows.kind] += rows.data.numel()
                    missing.discard(name)
            if missing:
                raise ExportError(f"has no {min(missing)}", where=str(model.path), why="llama.cpp would not load it")
            if head.rope_factors is not None:
                _add(writer, "rope_freqs.weight", _numbers(head.rope_factors), ())
            most = written.most_common(1)[0][0]
            writer.add_file_type(LlamaFileType[_FILE_TYPES.get(most, f"MOSTLY_{most.upper()}")])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return warnings


def unfit(model: LowBit, kind: str | None = None) -> frozenset[str]:
    """The linears whose values ``kind`` (None: any block type) cannot have; of experts in one tensor all, or none.

    Raises ExportError for what GGUF or llama.cpp cannot hold at all. Cost one reading and packing of the model.
    """
    names, found = Names(model.source), set[str]()
    for group in model.groups():
        for sites in _together(group, names):
            try:
                _pack([group.codes[site] for site in sites], kind, min(sites))
            except ExportError:
                found |= sites.keys()
    return frozenset(found)


def _inverse_frequencies(model: LowBit) -> Tensor | None:
    """What the model's rotary embedding turns by, scaling included."""
    found = (b for name, b in model.source.skeleton.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    return next(found, None)


def _unsaid(model: LowBit) -> Iterator[str]:
    if model.inputs:
        yield f"the inputs of {len(model.inputs)} linears are not rounded as the recipe says: engines do it their way"
    if model.kv is not None:
        yield "the format of keys and values is not in the file: set it in the engine (--cache-type-k, --cache-type-v)"


def _add_keys(writer: Any, arch: str, head: Written) -> None:
    for key, value in head.keys.items():
        full = f"{arch}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        else:
            writer.add_string(full, value)


def _add(writer: Any, name: str, rows: Rows, shape: tuple[int, ...]) -> None:
    """``shape`` without the dimension of bytes: (rows), or (experts, rows); () for a tensor of one dimension."""
    from gguf import GGMLQuantizationType

    kind = next(t for t in GGMLQuantizationType if t.name.lower() == rows.kind)
    writer.add_tensor(name, rows.data.reshape(*shape, -1).contiguous().numpy(), raw_dtype=kind)


def _tensors(group: Group, names: Names, kind: str | None) -> Iterator[tuple[str, Rows, tuple[int, ...]]]:
    """What a block becomes in the file."""
    stacks: dict[str, dict[int, Rows]] = {}
    for name, rows, places in _encoded(group, names, kind):
        for place in places:
            part = rows.data[place.rows]
            part = part if place.order is None else part[place.order]
            if place.expert is None:
                yield place.name, Rows(rows.kind, part), (len(part),) if _is_matrix(name, group) else ()
            else:
                stacks.setdefault(place.name, {})[place.expert] = Rows(rows.kind, part)
    for name, experts in stacks.items():
        if len({rows.kind for rows in experts.values()}) > 1 or sorted(experts) != list(range(len(experts))):
            raise ExportError("experts are of several types", where=name, why="GGUF has one tensor for all of a layer",
                              fix="one format for all experts")  # fmt: skip
        data = torch.cat([experts[e].data for e in range(len(experts))])
        yield name, Rows(experts[0].kind, data), (len(experts), len(experts[0].data))


def _is_matrix(name: str, group: Group) -> bool:
    return name.removesuffix(".weight") in group.codes or group.dense[name].ndim == 2


def _encoded(group: Group, names: Names, kind: str | None) -> Iterator[tuple[str, Rows, list[Place]]]:
    """Every tensor of a block by the model's name; experts that lie together in one type."""
    for together in _together(group, names):
        sites = list(together)
        encoded = _pack([group.codes[site] for site in sites], kind, sites[0])
        for site, rows in zip(sites, encoded, strict=True):
            yield f"{site}.weight", rows, together[site]
    known = names.places.keys()
    for name, tensor in group.dense.items():
        if name in known or name in group.edited:
            matrix = tensor.t() if name in names.transposed else tensor
            places = _find(names, name, matrix.shape[0])
            if names.family.norm_plus_one and name.endswith("norm.weight"):
                matrix = matrix.to(torch.float32) + 1
            yield name, _dense(matrix, places[0].name, kind), places


def _together(group: Group, names: Names) -> Iterable[dict[str, list[Place]]]:
    """The low-bit linears of a block and their places: those of one tensor, which has one type, together."""
    found: dict[str, dict[str, list[Place]]] = {}
    for site, q in group.codes.items():
        places = _find(names, f"{site}.weight", q.shape[0])
        found.setdefault(places[0].name, {})[site] = places
    return found.values()


def _find(names: Names, name: str, rows: int) -> list[Place]:
    if name in names.places:
        return names.places[name]
    if name.endswith(".bias") and not names.family.biases:
        raise ExportError(
            "is a bias that models of this family do not have", where=name,
            why="a transform added it, and llama.cpp would not read it", fix="gguf of a recipe without that transform",
        )  # fmt: skip
    if name.startswith("lm_head.") and names.family.arch == "gemma":
        raise ExportError("is a head of its own", where=name, why="llama.cpp uses the embedding in this family")
    return names.find(name, rows)


def _pack(together: list[QTensor], kind: str | None, where: str) -> Iterable[Rows]:
    try:
        if kind in DENSE:
            return [_plain(q.decode(), kind, where) for q in together]
        if kind is not None:
            return [Rows(kind, pack(q, kind)) for q in together]
        found, packed = smallest(*together)
        return [Rows(found, data) for data in packed]
    except ExportError as error:
        raise ExportError(error.what, where=f"{where}: {error.where}", why=error.why, fix=error.fix) from error


def _dense(tensor: Tensor, place: str, kind: str | None) -> Rows:
    """A tensor without codes: vectors and what llama.cpp computes with in float32, others as stored or as asked."""
    if tensor.ndim == 1 or place.endswith(_FLOAT32):
        return _numbers(tensor)
    if kind in DENSE:
        return _plain(tensor, kind, place)
    if tensor.dtype == torch.float32 and (packed := _whole_bytes(tensor)) is not None:
        return Rows("q8_0", packed)
    stored = next((name for name, dtype in DENSE.items() if dtype == tensor.dtype), "f32")
    return _plain(tensor, stored, place)


def _plain(tensor: Tensor, kind: str, where: str) -> Rows:
    data = tensor.to(DENSE[kind])
    if not torch.isfinite(data).all():
        raise ExportError(f"has values beyond {kind}", where=where, fix="bf16 or f32")
    return Rows(kind, data.contiguous().view(torch.uint8))


def _numbers(tensor: Tensor) -> Rows:
    data = tensor.to(torch.float32).contiguous()
    return Rows("f32", data.view(len(data), -1).view(torch.uint8))


def _whole_bytes(w: Tensor) -> UInt8[Tensor, "rows bytes"] | None:
    """Blocks of q8_0 where those have exactly these values, as of a matrix that was read from them."""
    rows, columns = w.shape
    if columns % 32:
        return None
    groups = w.view(rows, -1, 32)
    scale = (groups.abs().amax(-1) / 127).to(torch.float16)
    step = scale.to(torch.float32).unsqueeze(-1)
    codes = (groups / torch.where(step > 0, step, 1)).round_()
    if not torch.equal(codes * step, groups):
        return None
    q = Affine(
        (rows, columns), Codes.of(codes.view(rows, columns) + 128, 256), Raw.of(scale), None, Block("group", (32,))
    )
    return pack(q, "q8_0")


__all__ = ["DENSE", "kinds", "write"]
