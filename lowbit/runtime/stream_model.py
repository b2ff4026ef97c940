"""A checkpoint larger than memory as a transformers model: some blocks stay, the others pass through.

    streamed = stream("out", memory=512 << 20)
    streamed.model.generate(...)

Everything but low-bit weights is held: embedding, head, norms, biases, what a recipe kept in 16 bit. Of the low-bit
weights a fixed choice of blocks is read once; the others are read at every pass, ahead of their use, into a few
buffers of one block each. Within its own forward a block's weights are views of its buffer (or decoded from it, where
a shard is coded); outside of it they are nowhere (on the meta device), so that nothing can read what has been
overwritten.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from lowbit.arrays import Tensor
from lowbit.errors import CheckpointError, ModelError
from lowbit.io import native
from lowbit.io.layout import Contents, Settings, contents_of, opened
from lowbit.models.source import Source
from lowbit.models.store import Memory, read_json
from lowbit.runtime.kernels.coded import FEW_TOKENS
from lowbit.runtime.linear import PackedWeight, QLinear
from lowbit.runtime.reader import Buffer, Engine, Reader, Ticket
from lowbit.runtime.schedule import BUFFERS, Schedule, schedule
from lowbit.runtime.stream import Ring
from lowbit.runtime.stream_kernel import PANEL, PANELS
from lowbit.runtime.stream_shard import Extent, extent
from lowbit.runtime.transformers_quantizer import LowbitConfig, install

SLACK = 32 << 20
"""What allocators keep and threads need beside everything that is counted."""


@dataclass(frozen=True)
class Outline:
    """A checkpoint before its weights are read: the model on the meta device, and where everything is."""

    root: Path
    model: PreTrainedModel
    files: tuple[Path, ...]
    contents: tuple[Contents, ...]
    blocks: tuple[str, ...]
    """Blocks with low-bit weights, in the order of a pass; ``extents`` are theirs."""
    extents: tuple[Extent, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of memory that a block takes; of a coded one, decoded: somewhat more than is read for it."""
        return tuple(max(extent.nbytes, extent.decoded) for extent in self.extents)

    @property
    def outside(self) -> int:
        """Bytes on disk of all that is held whatever the schedule."""
        return sum(path.stat().st_size for path in self.files) - sum(extent.length for extent in self.extents)

    @property
    def weights(self) -> int:
        """How many low-bit weights there are."""
        return sum(linear.out_features * linear.in_features for linear in _linears(self.model).values())

    def fixed(self, tokens: int, dtype: torch.dtype, base: int | None = None) -> int:
        """Bytes held whatever the schedule, for texts of ``tokens``.

        Counted: this process as it is (``base`` in its place), weights outside the schedule, keys and values, what a
        prompt's activations and a panel of decoded rows take, the block in use where shards are coded, and SLACK.
        """
        held = sum(p.numel() * dtype.itemsize for p in self.model.parameters())
        text = self.model.config.get_text_config(decoder=True)
        width, heads = text.hidden_size, text.num_attention_heads
        head = getattr(text, "head_dim", None) or width // heads
        caches = 2 * (getattr(text, "num_key_value_heads", None) or heads) * head * text.num_hidden_layers
        widest = max((max(linear.weight.shape) for linear in _linears(self.model).values()), default=0)
        passing = tokens * 4 * (8 * width + 4 * widest) + 4 * 4 * text.vocab_size
        scratch = 4 * widest * (PANEL if tokens > FEW_TOKENS else 1)
        scratch += 2 * max((extent.decoded for extent in self.extents), default=0)  # a block, and while it is decoded
        base = int(psutil.Process().memory_info().rss) if base is None else base
        return int(base + held + caches * tokens * dtype.itemsize + passing + scratch + SLACK)


@dataclass(frozen=True)
class Streamed:
    """A model ready to run, and how it is spread over memory and disk."""

    model: PreTrainedModel
    schedule: Schedule
    ring: Ring | None
    """None when everything stays in memory."""
    engine: str


def stream(
    path: str | Path, memory: int | None, *, tokens: int = 1024, dtype: torch.dtype = torch.float32,
    engine: Engine = "auto", buffers: int = BUFFERS, base: int | None = None,
) -> Streamed:  # fmt: skip
    """Open a native checkpoint within ``memory`` bytes, this process and texts of ``tokens`` included; on the CPU.

    Every byte is checked against the manifest first (remembered for unchanged files). ``base`` stands for the size of
    this process where that is known better. Raises CheckpointError, StorageError, and RecipeError with the smallest
    memory that suffices.
    """
    root = Path(path)
    native.verify(root)
    found = outline(root)
    plan = schedule(found.sizes, memory, found.fixed(tokens, dtype, base), buffers)
    _fill(found, dtype)
    model = found.model.eval()
    linears = _linears(model)
    for linear in linears.values():
        linear.use_only(PANELS)
        linear.weight.apply(_into(dtype))
    passing = set(plan.streamed)
    used = _read_resident([found.extents[i] for i in range(len(found.extents)) if i not in passing], linears, engine)
    ring = None
    if plan.streamed:
        extents = [found.extents[i] for i in plan.streamed]
        reader = Reader([extent.path for extent in extents], engine=engine)
        ring, used = Ring(reader, extents, buffers), reader.engine
        for turn, i in enumerate(plan.streamed):
            _attach(model.get_submodule(found.blocks[i]), turn, ring, linears)
        weakref.finalize(model, reader.close)
    return Streamed(model, plan, ring, used)


def outline(root: Path) -> Outline:
    """Everything about a verified checkpoint but its weights. Raises CheckpointError and ModelError."""
    config = read_json(root / "config.json")
    settings = Settings.from_json(config.get("quantization_config") or {}, str(root / "config.json"))
    try:
        source = Source(root.name, AutoConfig.from_pretrained(root, local_files_only=True), Memory({}), root)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"transformers cannot read it: {error}", where=str(root)) from error
    model = source.skeleton
    install(model, settings, torch.float32)
    model.config.quantization_config = LowbitConfig(**config["quantization_config"])
    model.config._name_or_path = str(root)
    if (root / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(root, local_files_only=True)
    files = tuple(root / name for name in native.verify(root, contents=False)["files"])
    contents = []
    for path in files:
        with opened(path) as shard:
            contents.append(contents_of(shard, path))
    places: dict[str, Extent] = {}
    for path, held in zip(files, contents, strict=True):
        owners = {next(b for b in source.blocks if site.startswith(f"{b}.")) for site in held.specs}
        if len(owners) > 1:
            raise CheckpointError(f"holds {len(owners)} blocks, one at a time can be read", where=str(path))
        if place := extent(path, held.specs):
            places[owners.pop()] = place
    blocks = tuple(block for block in source.blocks if block in places)
    return Outline(root, model, files, tuple(contents), blocks, tuple(places[block] for block in blocks))


def _linears(model: nn.Module) -> dict[str, QLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QLinear)}


def _into(dtype: torch.dtype) -> Any:
    def set_dtype(module: nn.Module) -> None:
        if isinstance(module, PackedWeight):
            module.dtype = dtype

    return set_dtype


def _fill(found: Outline, dtype: torch.dtype) -> None:
    """Give the model everything but packed parts. Raises CheckpointError for what is unknown or missing."""
    for path, contents in zip(found.files, found.contents, strict=True):
        packed = {name for site, spec in contents.specs.items() for name in spec.paths(f"{site}.weight.")}
        with opened(path) as shard:
            for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                if name not in packed:
                    _put(found.model, name, shard.get_tensor(name), dtype, path)
    found.model.tie_weights()
    for name, parameter in found.model.named_parameters():
        if parameter.is_meta:
            raise CheckpointError(f"the part {name!r} is missing", where=str(found.root), fix="quantize again")


def _put(model: nn.Module, name: str, value: Tensor, dtype: torch.dtype, path: Path) -> None:
    parent, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
    except AttributeError:
        owner = None
    if owner is not None and owner._parameters.get(leaf) is not None:
        to = dtype if value.is_floating_point() else value.dtype
        owner._parameters[leaf] = nn.Parameter(value.to(to, copy=True), requires_grad=False)
    elif owner is not None and (held := owner._buffers.get(leaf)) is not None:
        owner._buffers[leaf] = value.to(held.dtype, copy=True)
    else:
        raise CheckpointError(f"the model has no {name!r}", where=str(path))


def _read_resident(extents: Sequence[Extent], linears: dict[str, QLinear], engine: Engine) -> str:
    """Read these blocks for good, each into memory of its own; returns the engine."""
    reader = Reader([extent.path for extent in extents], engine=engine)
    ahead: deque[tuple[Extent, Buffer, Ticket]] = deque()
    try:
        for i, extent in enumerate(extents):
            buffer = Buffer(extent.nbytes)
            ahead.append((extent, buffer, reader.submit(i, extent.offset, extent.length, buffer)))
            if len(ahead) == BUFFERS:
                _keep(reader, *ahead.popleft(), linears)
        while ahead:
            _keep(reader, *ahead.popleft(), linears)
        return reader.engine
    finally:
        reader.close()


def _keep(reader: Reader, extent: Extent, buffer: Buffer, ticket: Ticket, linears: dict[str, QLinear]) -> None:
    reader.wait(ticket)
    for site, parts in extent.parts(buffer.bytes).items():
        linears[site].point(parts)


def _attach(block: nn.Module, turn: int, ring: Ring, linears: dict[str, QLinear]) -> None:
    """Let a block take its weights from the ring before every forward and give them back after it."""
    extent = ring.extents[turn]
    mine = [(linears[site], site) for site in extent.places]
    nowhere = {
        site: {part: torch.empty(at.leaf.shape, dtype=getattr(torch, at.leaf.dtype), device="meta")
               for part, at in places.items()}
        for site, places in extent.places.items()
    }  # fmt: skip

    def enter(*_: Any) -> None:
        parts = extent.parts(ring.acquire(turn))
        for linear, site in mine:
            linear.point(parts[site])

    def leave(*_: Any) -> None:
        for linear, site in mine:
            linear.point(nowhere[site])
        ring.release()

    block.register_forward_pre_hook(enter)
    block.register_forward_hook(leave, always_call=True)
