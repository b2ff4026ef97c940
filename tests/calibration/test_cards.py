"""Activation cards: what a walk would collect, kept in a file, and files that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lowbit.calibration.cards import _ENTRY, LIGHT, Card, make, read
from lowbit.calibration.samples import Range, Reservoir
from lowbit.calibration.stats import AbsMax, AbsMean, Gram, Moments, Stat, Stats
from lowbit.calibration.text import Tokens
from lowbit.errors import CalibrationError, StorageError
from lowbit.formats.presets import preset
from lowbit.methods.base import Weight, method
from lowbit.models.resolve import open_model
from lowbit.models.source import Source

ALL: tuple[type[Stat], ...] = (*LIGHT, Gram, Reservoir)


@pytest.fixture(scope="module")
def source(llama: Path) -> Source:
    return open_model(str(llama))


@pytest.fixture(scope="module")
def windows(tokens: torch.Tensor) -> Tokens:
    return Tokens(tokens, "drawn", "0" * 64, 1)


@pytest.fixture(scope="module")
def made(source: Source, windows: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Card:
    return make(tmp_path_factory.mktemp("card") / "llama.card", source, windows, kinds=ALL, batch=4)


def inputs_of(root: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every linear reads when transformers runs the whole model: the oracle."""
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval()
    found: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers." in name:
            module.register_forward_pre_hook(
                lambda m, x, name=name: found.setdefault(name, []).append(x[0].flatten(0, 1))
            )
    with torch.no_grad():
        model(input_ids=ids)
    return {name: torch.cat(x) for name, x in found.items()}


def test_a_card_holds_the_statistics_of_every_input(made: Card, llama: Path, tokens: torch.Tensor) -> None:
    oracle = inputs_of(llama, tokens)
    assert {site for sites in made.inputs for site in sites} == set(oracle)
    assert len(oracle) == 14
    for site, x in oracle.items():
        stats = made.stats(site)
        near = {"rtol": 1e-4, "atol": 1e-5 * float(x.abs().max())}
        torch.testing.assert_close(stats[AbsMax].value, x.abs().amax(0), **near)
        torch.testing.assert_close(stats[AbsMean].value, x.abs().mean(0), **near)
        torch.testing.assert_close(stats[Moments].mean_square(), x.square().mean(0), **near)
        torch.testing.assert_close(stats[Range].low, x.amin(0).clamp_max(0), **near)
        gram = x.double().T @ x.double()
        torch.testing.assert_close(
            stats[Gram].sum().double(), gram, rtol=1e-4, atol=1e-5 * float(gram.diagonal().max())
        )
        assert stats[Moments].std == pytest.approx(float(x.std(correction=0)), rel=1e-4)
        assert stats[Moments].absmax == pytest.approx(float(x.abs().max()), rel=1e-5)
        rows = stats[Reservoir].rows  # of 192 tokens all are kept
        torch.testing.assert_close(rows.sum(0), x.sum(0), rtol=1e-3, atol=1e-4 * float(x.abs().sum(0).max()))
        assert len(rows) == len(x)
        assert all(stats[kind].tokens == tokens.numel() for kind in ALL)


def test_linears_that_read_one_tensor_share_one_entry(made: Card) -> None:
    leaves = [tuple(site.rpartition(".")[2] for site in sites) for sites in made.inputs]
    block = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert leaves == 2 * block


def test_what_is_read_goes_on_as_what_was_observed(made: Card, source: Source, windows: Tokens) -> None:
    """A rebuilt statistic takes more tokens and merges like the live one, bit for bit."""
    site = made.inputs[0][0]
    more = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    restored, again = made.stats(site), made.stats(site)
    live = Stats.of(site, ALL, 64)
    live.update(more)
    for kind in ALL:
        restored[kind].update(more)
        again[kind].merge(live[kind])
        assert restored[kind].tokens == windows.ids.numel() + 5
    torch.testing.assert_close(restored[Gram].sum(), again[Gram].sum())
    assert restored[Moments].kurtosis == pytest.approx(again[Moments].kurtosis, rel=1e-5)
    assert torch.equal(restored[AbsMax].value, again[AbsMax].value)


def test_methods_are_calibrated_from_a_card(made: Card, source: Source, llama: Path, tokens: torch.Tensor) -> None:
    """Weighted clipping and GPTQ lose less on the inputs than they do without knowing them."""
    site = "model.layers.1.mlp.down_proj"
    x = inputs_of(llama, tokens)[site]
    w = Weight(site, source.tensor(f"{site}.weight", (64, 96)).float())
    fmt = preset("int3-g32")

    def loss(name: str, options: dict[str, Any], stats: Stats) -> float:
        q = method(name, options)(w, stats, fmt)
        return float((x @ (q.decode() - w.matrix).T).square().mean())

    blind = loss("rtn", {"clip": 20}, Stats(site, {}))
    assert loss("rtn", {"clip": 20, "weighted": True}, made.stats(site)) < blind
    assert loss("gptq", {}, made.stats(site)) < 0.8 * blind


def test_experts_that_no_token_reached_are_held_and_say_so(families: dict[str, Path], tmp_path: Path) -> None:
    source = open_model(str(families["mixtral"]))
    few = Tokens(torch.tensor([[5, 6]]), "few", "0" * 64, None)  # two tokens, two of four experts each
    card = make(tmp_path / "m.card", source, few, kinds=ALL)
    assert sum(map(len, card.inputs)) == sum(len(source.sites(block)) for block in source.blocks)
    experts = [site for sites in card.inputs for site in sites if ".experts." in site]
    reached = {site for site in experts if AbsMax in card.stats(site)}
    assert 0 < len(reached) < len(experts)
    with pytest.raises(CalibrationError, match="no calibration token reached"):
        card.stats(min(set(experts) - reached))[Moments]


def test_the_file_is_the_same_for_the_same_pass(made: Card, source: Source, windows: Tokens, tmp_path: Path) -> None:
    card = make(tmp_path / "again.card", source, windows, kinds=ALL, batch=4)
    assert card.path.read_bytes() == made.path.read_bytes()
    assert card.digest == made.digest == read(made.path).digest
    assert (card.about.text, card.about.windows, card.about.length) == ("drawn", 6, 32)
    assert card.kinds == set(ALL)
    assert card.about.tokens_digest == windows.digest
    assert [p.name for p in tmp_path.iterdir()] == ["again.card"]
    light = make(tmp_path / "light.card", source, windows)
    assert light.path.stat().st_size < made.path.stat().st_size / 4
    with pytest.raises(CalibrationError, match="no Gram was collected"):
        light.stats(light.inputs[0][0])[Gram]


def test_a_card_of_another_model_is_refused(made: Card, source: Source, families: dict[str, Path]) -> None:
    made.check(source)
    with pytest.raises(CalibrationError, match=r"llama\.card: was made from the model"):
        made.check(open_model(str(families["mistral"])))
    with pytest.raises(CalibrationError, match=r"knows no input of 'model\.layers\.7\.x'"):
        made.stats("model.layers.7.x")


def test_what_cannot_be_made(source: Source, windows: Tokens, tmp_path: Path) -> None:
    class Other(AbsMax):
        pass

    with pytest.raises(CalibrationError, match="cannot hold AbsMax, Other"):
        make(tmp_path / "a.card", source, windows, kinds=(AbsMax, Other))
    with pytest.raises(StorageError, match="cannot be written"):
        make(tmp_path / "nowhere" / "a.card", source, windows)


def altered(card: Card, path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a card whose header and tensors were changed."""
    with safe_open(card.path, framework="pt") as file:
        header = json.loads(file.metadata()[_ENTRY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    change(header, tensors)
    save_file(tensors, path, metadata={_ENTRY: json.dumps(header)})
    return path


FIRST = "model.layers.0.self_attn.q_proj"
MAX = f"{FIRST}.AbsMax.value"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.update(version=2), "version: Input should be 1"),
        (lambda h, t: h.update(code="x"), "code: Extra inputs"),
        (lambda h, t: h["about"].update(model="../../etc"), r"about\.model: String should match"),
        (lambda h, t: h["about"].update(windows=True), r"about\.windows"),
        (lambda h, t: h["inputs"][0].update(tokens=-1), r"inputs\.0\.tokens"),
        (lambda h, t: h["inputs"][0].update(width=1 << 40), r"inputs\.0\.width"),
        (lambda h, t: h["inputs"][0].update(width=1 << 20), "is F32 .* expected torch.float32"),
        (lambda h, t: h["inputs"][0]["sites"].append(h["inputs"][1]["sites"][0]), "twice"),
        (lambda h, t: h.update(kinds=["AbsMax", "AbsMax"]), "twice"),
        (lambda h, t: h.update(kinds=["Pickle"]), r"kinds\.0"),
        (lambda h, t: h.update(kinds=["AbsMax"]), "does not hold the tensors"),
        (lambda h, t: h["inputs"].pop(), "does not hold the tensors"),
        (lambda h, t: t.pop(MAX), "does not hold the tensors"),
        (lambda h, t: t.update({MAX: t[MAX][:-1]}), r"AbsMax\.value is F32 \(63,\)"),
        (lambda h, t: t.update({MAX: t[MAX].double()}), r"AbsMax\.value is F64"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(made: Card, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read(altered(made, tmp_path / "bad.card", change))


def test_contents_that_were_altered_are_refused(made: Card, tmp_path: Path) -> None:
    card = read(altered(made, tmp_path / "a.card", lambda h, t: t[MAX].add_(1)))
    card.stats("model.layers.1.mlp.down_proj")
    with pytest.raises(CalibrationError, match=r"a\.card: model.*AbsMax\.value was altered"):
        card.stats(FIRST)

    def forged(value: float) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
        def change(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
            from lowbit import digest

            tensors[MAX][3] = value
            header["sha256"][MAX] = digest.of_tensor(tensors[MAX])

        return change

    for value in (float("nan"), float("inf"), -1.0):
        with pytest.raises(CalibrationError, match="no statistic"):
            read(altered(made, tmp_path / "b.card", forged(value))).stats(FIRST)


def test_what_is_no_card_is_refused(made: Card, tmp_path: Path, llama: Path) -> None:
    with pytest.raises(CalibrationError, match="is no activation card"):
        read(llama / "model.safetensors")
    (tmp_path / "cut.card").write_bytes(made.path.read_bytes()[:-100])
    (tmp_path / "text.card").write_text("not a card")
    (tmp_path / "deep.card").write_text("")
    for name in ("cut", "text", "deep", "nowhere"):
        with pytest.raises(CalibrationError, match=rf"{name}\.card: cannot be read"):
            read(tmp_path / f"{name}.card")
    save_file({}, tmp_path / "nested.card", metadata={_ENTRY: "[" * 100_000})
    with pytest.raises(CalibrationError, match=_ENTRY):
        read(tmp_path / "nested.card")
