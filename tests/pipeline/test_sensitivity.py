"""Sensitivity: Fisher information against plain autograd, predictions against measured KL, the file against lies."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from transformers import AutoModelForCausalLM

from lowbit.calibration.text import Tokens
from lowbit.errors import CalibrationError, RecipeError
from lowbit.formats.presets import preset
from lowbit.models.graph import matrix, set_matrix, split_experts
from lowbit.models.source import Source, of_directory
from lowbit.pipeline import sensitivity as module
from lowbit.pipeline.fisher import output_fisher
from lowbit.pipeline.sensitivity import Sensitivity, fused, measure, read

FORMATS = ["int3-g32", "int5-g32"]
SHORT = torch.randint(0, 288, (2, 16), generator=torch.Generator().manual_seed(2))


def windows(ids: torch.Tensor) -> Tokens:
    return Tokens(ids, "random", "0" * 64, 0)


def whole_model(root: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    split_experts(model)
    return model.eval().requires_grad_(False)


def by_autograd(model: Any, ids: torch.Tensor, sites: list[str], batch: int) -> dict[str, torch.Tensor]:
    """Squared gradients (tokens, out) from the whole model in memory, with ordinary retained outputs."""
    outputs: dict[str, list[torch.Tensor]] = {site: [] for site in sites}
    embedding = model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())

    def keep(site: str) -> Any:
        def hook(_module: Any, _inputs: Any, out: torch.Tensor) -> None:
            out.retain_grad()
            outputs[site].append(out)

        return hook

    hooks = [model.get_submodule(site).register_forward_hook(keep(site)) for site in sites]
    draw = torch.Generator().manual_seed(0)
    for part in ids.split(batch):
        log_p = model(part, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=draw)
        (-log_p.gather(1, labels).sum()).backward()
    for hook in (*hooks, embedding):
        hook.remove()
    return {
        site: torch.cat([out.grad.reshape(-1, out.shape[-1]) for out in held]).square()
        for site, held in outputs.items()
        if held
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mixtral"])
def test_fisher_is_that_of_plain_autograd(families: dict[str, Path], name: str, tokens: torch.Tensor) -> None:
    source = of_directory(families[name])
    sites = [site.name for block in source.blocks for site in source.sites(block)]
    found = output_fisher(source, tokens[:3], set(sites), torch.float32, 2)
    expected = by_autograd(whole_model(families[name]), tokens[:3], sites, 2)
    assert found.keys() == expected.keys()
    for site, square in expected.items():
        torch.testing.assert_close(found[site].outputs, square.mean(0), rtol=2e-3, atol=1e-9)
        torch.testing.assert_close(found[site].tokens, square.sum(1) / square.sum(1).mean(), rtol=2e-3, atol=1e-5)


def test_gradients_need_memory_for_one_block(
    llama: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of a block are read twice a batch, and none are alive when another block's are read."""
    source = of_directory(llama)
    load, alive, most, loads = Source.load, 0, 0, 0

    def loading(self: Source, prefix: str, dtype: torch.dtype) -> torch.nn.Module:
        nonlocal alive, most, loads
        block = load(self, prefix, dtype)
        loads, alive = loads + 1, alive + 1
        most = max(most, alive)

        def freed() -> None:
            nonlocal alive
            alive -= 1

        weakref.finalize(next(block.parameters()), freed)
        return block

    monkeypatch.setattr(Source, "load", loading)
    output_fisher(source, tokens[:4], set(), torch.float32, 2)
    assert loads == 2 * 2 * len(source.blocks)
    assert most <= 2  # the last one of a pass is freed as the next is read


def kl_alone(model: Any, ids: torch.Tensor, sites: list[str], fmt: str) -> float:
    """KL of the model in which only ``sites`` are rounded to nearest."""
    log_p = model(ids, use_cache=False).logits.log_softmax(-1)
    held = {site: matrix(model.get_submodule(site)).clone() for site in sites}
    for site, w in held.items():
        set_matrix(model.get_submodule(site), preset(fmt).encode(w, preset(fmt).fit(w)).decode())
    log_q = model(ids, use_cache=False).logits.log_softmax(-1)
    for site, w in held.items():
        set_matrix(model.get_submodule(site), w)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize(("name", "least"), [("llama", 0.4), ("mixtral", 0.2)])
def test_predictions_are_the_kl_of_one_linear_alone(families: dict[str, Path], name: str, least: float) -> None:
    """In order, and to a factor of two and a half; less is foreseen where errors choose other experts."""
    tokens = torch.randint(0, 288, (16, 32), generator=torch.Generator().manual_seed(4))
    found = measure(of_directory(families[name]), windows(tokens), FORMATS, encoder="rtn", batch=4)
    model = whole_model(families[name])
    predicted, measured = [], []
    for group in dict.fromkeys(row.group for row in found.sites):
        rows = [row for row in found.sites if row.group == group]
        for fmt in FORMATS:
            predicted.append(sum(row.loss[fmt] for row in rows))
            measured.append(kl_alone(model, tokens, [row.name for row in rows], fmt))
    assert scipy.stats.spearmanr(predicted, measured).statistic > 0.9
    ratios = [p / m for p, m in zip(predicted, measured, strict=True)]
    assert least < min(ratios) <= max(ratios) < 2.5


def test_losses_are_the_formula(llama: Path, tokens: torch.Tensor) -> None:
    """One half of the mean over held-out tokens of sum_o F_o w_t (dW x)², a token at a time."""
    source = of_directory(llama)
    ids = tokens.repeat(2, 1)[:, :24]
    found = measure(source, windows(ids), FORMATS, encoder="rtn")
    assert (found.windows, found.held, found.length) == (12, 3, 24)
    model, site = whole_model(llama), "model.layers.1.mlp.down_proj"
    square = by_autograd(model, ids[:3], [site], 2)[site]
    inputs: list[torch.Tensor] = []
    hook = model.get_submodule(site).register_forward_pre_hook(lambda _m, x: inputs.append(x[0].flatten(0, 1)))
    model(ids[:3], use_cache=False)
    hook.remove()
    W = matrix(model.get_submodule(site)).detach()
    losses = next(row.loss for row in found.sites if row.name == site)
    for fmt in FORMATS:
        error = preset(fmt).encode(W, preset(fmt).fit(W)).decode() - W
        each = [
            0.5 * float(square.mean(0) @ (error @ x).square()) * float(g.sum() / square.sum() * len(square))
            for x, g in zip(torch.cat(inputs), square, strict=True)
        ]
        assert losses[fmt] == pytest.approx(sum(each) / len(each), rel=2e-3)


def test_errors_are_those_on_windows_that_the_encoder_has_not_seen(llama: Path) -> None:
    """With fewer tokens than inputs GPTQ makes errors vanish on what it saw, and nowhere else."""
    ids = torch.randint(0, 288, (4, 12), generator=torch.Generator().manual_seed(3))
    apart = measure(of_directory(llama), windows(ids), ["int3-g32"], options={"damp": 1e-4})
    same = measure(of_directory(llama), windows(ids[:1].expand(4, -1)), ["int3-g32"], options={"damp": 1e-4})
    seen, unseen = (sum(row.loss["int3-g32"] for row in found.sites) for found in (same, apart))
    assert seen < unseen / 3
    with pytest.raises(CalibrationError, match="both fitted and held out"):
        measure(of_directory(llama), windows(ids[:1]), ["int3-g32"])


def test_a_sample_of_rows_stands_for_all(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = of_directory(llama)
    whole = measure(source, windows(SHORT), ["int3-g32", "int4-tensor"], encoder="rtn")
    monkeypatch.setattr(module, "_ROWS", 16)
    part = measure(source, windows(SHORT), ["int3-g32", "int4-tensor"], encoder="rtn")
    for a, b in zip(whole.sites, part.sites, strict=True):
        assert b.loss["int3-g32"] == pytest.approx(a.loss["int3-g32"], rel=0.5)
        assert b.loss["int4-tensor"] == a.loss["int4-tensor"]  # its scale is that of all rows
    assert any(a.loss["int3-g32"] != b.loss["int3-g32"] for a, b in zip(whole.sites, part.sites, strict=True))


def test_groups_are_what_engines_fuse(families: dict[str, Path]) -> None:
    def groups(name: str) -> set[tuple[str, ...]]:
        rows = measure(of_directory(families[name]), windows(SHORT), ["int4-g32"], encoder="rtn").sites
        held: dict[str, list[str]] = {}
        for row in rows:
            if ".0." in row.name.split("experts")[0]:
                held.setdefault(row.group, []).append(row.name.partition(".0.")[2])
        return {tuple(sorted(names)) for names in held.values()}

    attention = {("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"), ("self_attn.o_proj",)}
    assert groups("llama") == attention | {("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)}
    assert groups("mixtral") == attention | {
        tuple(f"mlp.experts.{e}.{leaf}" for e in range(4)) for leaf in ("gate_up_proj", "down_proj")
    }
    # attention and MLP of a parallel block read one input, and are two matrices all the same
    alone = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert groups("falcon") == {(leaf,) for leaf in alone}


def test_gate_and_up_of_all_experts_are_one_group() -> None:
    sites = [("b.0.experts.0.gate", "b.0.experts.0.up"), ("b.0.experts.1.gate",), ("b.0.experts.1.up",)]
    assert len(set(fused([*sites, ("b.0.experts.0.down",)]).values())) == 2
    assert fused([("b.0.a.q", "b.0.a.k")]) == dict.fromkeys(("b.0.a.q", "b.0.a.k"), "b.0.a.q+k")


def test_experts_that_no_token_reached(families: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source = of_directory(families["mixtral"])
    one = torch.full((2, 8), 7)
    found = measure(source, windows(one), ["int4-g32"], encoder="rtn")
    silent = [row for row in found.sites if row.tokens == 0]
    assert silent
    assert all(row.loss == {"int4-g32": 0.0} and ".experts." in row.name for row in silent)
    monkeypatch.setattr(module, "fused", lambda inputs: {site: site for shared in inputs for site in shared})
    with pytest.raises(CalibrationError, match="no calibration token reached"):
        measure(source, windows(one), ["int4-g32"], encoder="rtn")


@pytest.fixture(scope="module")
def known(llama: Path) -> Sensitivity:
    return measure(of_directory(llama), windows(SHORT), FORMATS, encoder="rtn")


def test_it_is_measured_with_the_codes_of_the_method(llama: Path) -> None:
    ids = windows(torch.randint(0, 288, (16, 32), generator=torch.Generator().manual_seed(4)))
    steps: list[tuple[int, int]] = []
    rtn = measure(of_directory(llama), ids, ["int3-g32"], encoder="rtn")
    gptq = measure(
        of_directory(llama), ids, ["int3-g32"], options={"damp": 0.02}, on_block=lambda d, t: steps.append((d, t))
    )
    assert (gptq.encoder, gptq.options) == ("gptq", {"damp": 0.02})
    assert sum(r.loss["int3-g32"] for r in gptq.sites) < 0.9 * sum(r.loss["int3-g32"] for r in rtn.sites)
    assert steps == [(i, 10) for i in range(1, 11)]  # two batches are held out: twice over 2 blocks, then all once more
    with pytest.raises(RecipeError, match="unknown format"):
        measure(of_directory(llama), ids, ["int9-g32"])


def test_the_file_is_what_was_measured(known: Sensitivity, tmp_path: Path, llama: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(known.model_dump(mode="json")))
    assert read(path) == known
    read(path).check(of_directory(llama))
    assert (known.windows, known.held, known.length) == (2, 1, 16)
    assert known.model_digest == of_directory(llama).digest


def site_changed(value: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**value, "sites": [{**value["sites"][0], **changes}, *value["sites"][1:]]}


BROKEN = {
    "not JSON": lambda v: "{",
    "another kind of file": lambda v: {"lowbit": "evidence"},
    "a later version": lambda v: {**v, "version": 2},
    "an unknown field": lambda v: {**v, "surprise": 1},
    "a negative loss": lambda v: site_changed(v, loss=dict.fromkeys(FORMATS, -1.0)),
    "a loss that is infinite": lambda v: site_changed(v, loss=dict.fromkeys(FORMATS, float("inf"))),
    "a format too few": lambda v: site_changed(v, loss={FORMATS[0]: 1.0}),
    "a site twice": lambda v: {**v, "sites": [v["sites"][0], *v["sites"]]},
    "no digest": lambda v: {**v, "model_digest": "abc"},
    "no sites": lambda v: {**v, "sites": []},
}


@pytest.mark.parametrize("how", list(BROKEN))
def test_what_is_no_sensitivity_is_refused(known: Sensitivity, tmp_path: Path, how: str) -> None:
    value = BROKEN[how](known.model_dump(mode="json"))
    path = tmp_path / "s.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(CalibrationError, match="no sensitivity file"):
        read(path)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match="cannot be read"):
        read(tmp_path / "none.json")
    (tmp_path / "s.json").write_text("{" + " " * 100)
    monkeypatch.setattr(module, "_LIMIT", 50)
    with pytest.raises(CalibrationError, match="larger than"):
        read(tmp_path / "s.json")


def test_another_model_is_refused(known: Sensitivity, families: dict[str, Path]) -> None:
    with pytest.raises(CalibrationError, match="another model"):
        known.check(of_directory(families["mistral"]))
