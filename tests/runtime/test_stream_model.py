"""Models that are partly on disk against the same models in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, family_model, save_model

import lowbit
from lowbit.errors import CheckpointError, RecipeError, StorageError
from lowbit.io.compress import coded_files, compress
from lowbit.runtime.linear import QLinear
from lowbit.runtime.reader import Engine
from lowbit.runtime.stream_model import Streamed, outline, stream

LAYERS, TOKENS = 6, 24
IDS = torch.randint(1, VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def deep(make: Callable[..., Path], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six blocks of int4; read only."""
    root = save_model(family_model("llama", num_hidden_layers=LAYERS), tokenizer, tmp_path_factory.mktemp("deep"))
    return make(root, "rtn:int4-g32")


@pytest.fixture(scope="module")
def whole(deep: Path) -> Any:
    return lowbit.load(deep, dtype=torch.float32)


@pytest.fixture(scope="module")
def text(whole: Any) -> list[int]:
    """What the model says that is in memory."""
    return said(whole)


def said(model: Any) -> list[int]:
    ids: list[int] = model.generate(IDS, max_new_tokens=3, do_sample=False)[0].tolist()
    return ids


def opened(root: Path, blocks: int, **options: Any) -> Streamed:
    """With memory for so many blocks, buffers among them, and everything else."""
    found = outline(root)
    memory = found.fixed(TOKENS, torch.float32, 0) + blocks * max(found.sizes)
    return stream(root, memory, tokens=TOKENS, base=0, **options)


@pytest.mark.parametrize(
    ("blocks", "streamed", "engine"),
    [(6, 0, "auto"), (4, 4, "auto"), (2, 6, "auto"), (2, 6, "threads")],
)
def test_any_memory_says_the_same(
    deep: Path, whole: Any, text: list[int], blocks: int, streamed: int, engine: Engine
) -> None:
    found = opened(deep, blocks, engine=engine)
    assert len(found.schedule.streamed) == streamed
    assert (found.engine == "threads") or engine == "auto"
    assert said(found.model) == text
    with torch.inference_mode():
        torch.testing.assert_close(found.model(IDS).logits, whole(IDS).logits, rtol=1e-4, atol=1e-5)


def test_every_family_streams(family: Path, make: Callable[..., Path]) -> None:
    """With a single buffer, so that two blocks are enough to stream; tied heads, biases, experts and all."""
    root = make(family, "rtn:int4-g32")
    found = opened(root, 1, buffers=1)
    assert len(found.schedule.streamed) == len(found.schedule.blocks) == 2
    whole: Any = lowbit.load(root, dtype=torch.float32, kernels="reference")
    with torch.inference_mode():
        torch.testing.assert_close(found.model(IDS).logits, whole(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["rtn:nf4-dq", "rtn:int3-g32", "rtn:int8-row+a:int8-token"])
def test_other_weights_stream_too(llama: Path, make: Callable[..., Path], recipe: str) -> None:
    root = make(llama, recipe)
    whole: Any = lowbit.load(root, dtype=torch.float32)
    with torch.inference_mode():
        ours, theirs = opened(root, 1, buffers=1).model(IDS).logits, whole(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def coded(make: Callable[..., Path], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Blocks that are worth coding, and the same coded; read only."""
    folder, wide = tmp_path_factory.mktemp("wide"), {"hidden_size": 128, "intermediate_size": 512}
    plain = make(save_model(family_model("llama", num_hidden_layers=3, **wide), tokenizer, folder), "rtn:int4-g128")
    compress(plain, folder / "coded")
    assert len(coded_files(folder / "coded")) == 4  # the blocks, and what is outside of them
    return plain, folder / "coded"


@pytest.mark.parametrize(("blocks", "streamed"), [(3, 0), (2, 3)])
def test_coded_shards_are_decoded_as_they_are_used(coded: tuple[Path, Path], blocks: int, streamed: int) -> None:
    plain, packed = coded
    whole: Any = lowbit.load(plain, dtype=torch.float32, kernels="dense")
    found = opened(packed, blocks)
    assert len(found.schedule.streamed) == streamed
    assert sum(outline(packed).sizes) <= sum(outline(plain).sizes)
    assert max(e.length for e in outline(packed).extents) < 0.95 * max(e.length for e in outline(plain).extents)
    assert said(found.model) == said(whole)
    if found.ring is not None:  # what is read is what is stored
        assert {buffer.nbytes for buffer in found.ring.buffers} == {max(e.nbytes for e in found.ring.extents)}


def test_coded_bytes_that_change_while_they_stream_are_one_clear_error(
    coded: tuple[Path, Path], tmp_path: Path
) -> None:
    root = copied(coded[1], tmp_path / "copy")
    found, place = opened(root, 2), outline(root).extents[1]
    content = bytearray(place.path.read_bytes())
    content[place.offset + place.length // 2] ^= 1
    place.path.write_bytes(content)
    assert found.ring is not None
    found.ring.acquire(2)  # what was read ahead may still be whole: read anew
    with pytest.raises(CheckpointError, match=r"lowbit-block-00001.safetensors: cannot be decoded: .*checksum"):
        found.model(IDS)


def test_what_is_held_is_what_was_counted(deep: Path) -> None:
    found = opened(deep, 4)
    assert found.ring is not None
    assert sum(buffer.nbytes for buffer in found.ring.buffers) == found.schedule.room
    linears = {name: m for name, m in found.model.named_modules() if isinstance(m, QLinear)}
    names = outline(deep).blocks
    for i, name in enumerate(names):
        here = {part.device.type for site, m in linears.items() if site.startswith(name) for part in m.weight.buffers()}
        assert here == ({"meta"} if i in found.schedule.streamed else {"cpu"})  # nowhere outside of its turn
    with torch.inference_mode():
        found.model(IDS)
    assert all(linear._tree is None or not next(linear.weight.buffers()).is_meta for linear in linears.values())


def test_a_pass_that_was_broken_off_spoils_nothing(deep: Path, text: list[int]) -> None:
    found = opened(deep, 2)
    layer = found.model.get_submodule("model.layers.3.mlp")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        found.model(IDS)
    hook.remove()
    assert said(found.model) == text


def copied(root: Path, to: Path) -> Path:
    to.mkdir()
    for path in root.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_shard_cut_short_while_it_streams_is_one_clear_error(deep: Path, text: list[int], tmp_path: Path) -> None:
    root = copied(deep, tmp_path / "copy")
    found, shard = opened(root, 2), root / "lowbit-block-00004.safetensors"
    assert said(found.model) == text
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(StorageError, match=r"lowbit-block-00004.safetensors: cannot be read: ends at byte"):
        said(found.model)  # what was read ahead may still be whole: not the first pass
    shard.write_bytes(content)
    assert said(found.model) == text


def test_an_altered_shard_is_refused_at_once(deep: Path, tmp_path: Path) -> None:
    root = copied(deep, tmp_path / "copy")
    shard = root / "lowbit-block-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="lowbit-block-00002"):
        opened(root, 2)


def test_the_smallest_memory_is_named_and_works(deep: Path, text: list[int]) -> None:
    with pytest.raises(RecipeError, match="cannot hold this model") as refused:
        stream(deep, 1 << 20, tokens=TOKENS, base=0)
    (least,) = map(int, re.findall(r"smallest is (\d+)MiB", str(refused.value)))
    found = stream(deep, least << 20, tokens=TOKENS, base=0)
    assert said(found.model) == text
    with pytest.raises(RecipeError):
        stream(deep, (least - 1) << 20, tokens=TOKENS, base=0)


def test_load_takes_a_memory(deep: Path, text: list[int]) -> None:
    assert said(lowbit.load(deep, dtype=torch.float32, memory=64 << 30)) == text
    with pytest.raises(RecipeError, match="memory goes with the CPU"):
        lowbit.load(deep, memory=64 << 30, kernels="dense")
