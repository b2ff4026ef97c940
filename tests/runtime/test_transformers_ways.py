"""What transformers, accelerate, PEFT and torch.compile do with a low-bit model."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import family_model
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.codec.stream import encode
from lowbit.errors import FormatError, ModelError
from lowbit.formats.activation import Input, activation
from lowbit.formats.ec import Lattice
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import QTensor
from lowbit.runtime.facade import cache_format, use_kernels
from lowbit.runtime.linear import QLinear


def quantized(recipe: str, tokens: torch.Tensor) -> Any:
    return lowbit.quantize(family_model("llama", num_hidden_layers=1), recipe, tokens=tokens)


def linear(name: str, input: Input | None = None) -> QLinear:
    w = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    if name == "ec3":
        q: QTensor = Lattice.of(torch.linspace(1, 2, 64)).tree(encode((4 * w).round().to(torch.int16)), (96, 64), -4.0)
    else:
        q = preset(name).encode(w, preset(name).fit(w))
    return QLinear.of(q, input=input)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits  # type: ignore[no-any-return]


# --- save and load ---------------------------------------------------------------------------------------------------

RECIPES = ["nested:int8-row", "rtn:ec3", "awq+rtn:int4-g32+a:int8-tensor-static+kv:int4-head"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_saved_is_all_that_is_needed(recipe: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    """Pushing to the Hub uploads a folder that ``save_pretrained`` wrote."""
    model = quantized(recipe, tokens)
    model.save_pretrained(tmp_path / "saved")
    held = {path.name for path in (tmp_path / "saved").iterdir()}
    assert held == {"config.json", "generation_config.json", "model.safetensors"}
    text = (tmp_path / "saved" / "config.json").read_text()
    assert str(tmp_path) not in text
    assert "/" not in json.dumps(json.loads(text)["quantization_config"])
    moved = shutil.move(tmp_path / "saved", tmp_path / "elsewhere")
    again = AutoModelForCausalLM.from_pretrained(moved, dtype=torch.float32)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert cache_format(again) == cache_format(model)
    again.save_pretrained(tmp_path / "twice")
    for name in held:
        assert (tmp_path / "twice" / name).read_bytes() == (Path(moved) / name).read_bytes(), name


def test_accelerate_places_it(tokens: torch.Tensor, checkpoint: Path) -> None:
    placed = AutoModelForCausalLM.from_pretrained(checkpoint, device_map="auto", dtype=torch.float32)
    assert torch.equal(logits(placed, tokens), logits(lowbit.load(checkpoint, dtype=torch.float32), tokens))


# --- compilers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """``torch.compile`` that takes no breaks, without the checks that tests wrap around ``QLinear.forward``."""
    monkeypatch.setattr(QLinear, "forward", inspect.unwrap(QLinear.forward))
    torch._dynamo.reset()
    return lambda module: torch.compile(module, backend="eager", fullgraph=True)


def test_one_graph_without_breaks_and_the_same_logits(compiler: Callable[[Any], Any], tokens: torch.Tensor) -> None:
    model = quantized("llmint8:int8-row-sym,threshold=2+a:int8-token", tokens)
    compiled = compiler(model)
    assert torch.equal(logits(compiled, tokens), logits(model, tokens))
    use_kernels(model, "dense")  # the operator asks the linear when it runs
    assert not any(linear._states for linear in model.modules() if isinstance(linear, QLinear))
    assert torch.equal(logits(compiled, tokens), logits(model, tokens))


def test_a_copy_is_compiled_as_itself(compiler: Callable[[Any], Any]) -> None:
    first = linear("ec3")
    second = copy.deepcopy(first)
    second.bias = torch.nn.Parameter(torch.ones(96))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = [compiler(module)(x) for module in (first, second)]
        assert torch.equal(found[0], first(x))
    assert torch.equal(found[1], found[0] + 1)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_learns_and_nothing_else(tokens: torch.Tensor, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig

    from lowbit.runtime import lora

    recipe = "rtn:nf4-dq"
    model = quantized(recipe, tokens)
    before, plain = {name: part.clone() for name, part in model.state_dict().items()}, logits(model, tokens)
    adapted = lora.attach(model, LoraConfig(r=4, target_modules="all-linear"))
    assert torch.equal(logits(adapted, tokens), plain)  # B starts at zero
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7
    assert all("lora_A" in name or "lora_B" in name for name in trainable)

    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = adapted(tokens, labels=tokens).loss
        loss.backward()
        losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    moved = [name for name in trainable if "lora_B" in name and adapted.get_parameter(name).abs().sum() == 0]
    assert not moved  # gradients reached every linear
    after = {name.replace("base_layer.", ""): part for name, part in model.state_dict().items()}
    assert all(torch.equal(after[name], part) for name, part in before.items())

    adapted.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = lora.restore(quantized(recipe, tokens), tmp_path)
    assert torch.equal(logits(again, tokens), logits(adapted, tokens))
    with pytest.raises(FormatError, match="cannot be merged"):
        adapted.merge_and_unload()
    with pytest.raises(ModelError, match="no low-bit linears"):
        lora.attach(family_model("llama", num_hidden_layers=1), LoraConfig(r=4, target_modules="all-linear"))


def test_training_keeps_no_decoded_weights() -> None:
    q = linear("int4-g32")
    x, kept = torch.randn(5, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        y = q(x)
    y.square().sum().backward()
    W = q.weight.qtensor().decode()
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ W.T) @ W)
    assert W.shape not in kept


def test_gradients_pass_rounded_inputs() -> None:
    q = linear("int8-row-sym", Input(activation("int4-token")))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = q(x)
    with torch.no_grad():
        torch.testing.assert_close(y, q(x))  # without gradients the packed kernel multiplies
    y.backward(y.detach())
    torch.testing.assert_close(x.grad, y.detach() @ q.weight.qtensor().decode())
