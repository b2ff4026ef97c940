"""The two familiar calls, and what transformers makes of their results: loading, generating, saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import family_model
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.errors import CheckpointError, CoverageError, ModelError, RecipeError
from lowbit.io.native import qtensors
from lowbit.models.graph import set_matrix, split_experts
from lowbit.runtime.facade import compute_dtype, use_kernels
from lowbit.runtime.linear import QLinear

GPTQ = "gptq:int4-g32,clip=0"


def linears(model: Any) -> dict[str, QLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QLinear)}


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "recipe"), [("llama", GPTQ), ("gpt2", GPTQ), ("mixtral", GPTQ), ("llama", "rtn:nf4-dq")]
)
def test_quantizing_in_memory_makes_the_bytes_of_the_checkpoint(
    name: str, recipe: str, families: dict[str, Path], tokens: torch.Tensor, make: Any
) -> None:
    calibration = tokens if recipe == GPTQ else None
    out = make(families[name], recipe, calibration)
    model = lowbit.quantize(family_model(name), recipe, tokens=calibration)
    assert isinstance(model, torch.nn.Module)
    held = linears(model)
    written = dict(qtensors(out))
    assert held.keys() == written.keys()
    for site, q in written.items():
        pairs = zip(q.parts(), held[site].weight.qtensor().parts(), strict=True)
        assert all(a.path == b.path and torch.equal(a.data, b.data) for a, b in pairs), site
    loaded = lowbit.load(out, dtype=torch.float32)
    assert torch.equal(logits(model, tokens), logits(loaded, tokens))


def test_text_and_tokenizer_do_what_tokens_do(llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i} and the number {i * i}" for i in range(3000)))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[[step]]\nmethod = "gptq"\nformat = "int4-g32"\n[calibration]\nsamples = 4\nlength = 32\n', encoding="utf-8"
    )
    by_text = lowbit.quantize(family_model("llama"), str(recipe), text=str(text), tokenizer=tokenizer)
    directory = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    by_name = lowbit.quantize(directory, str(recipe), text=str(text))  # the tokenizer beside the weights
    assert linears(by_text)
    for site, layer in linears(by_text).items():
        assert torch.equal(layer.weight.qtensor().decode(), linears(by_name)[site].weight.qtensor().decode())


@pytest.mark.parametrize(
    ("recipe", "error"),
    [("gptq:int4-g32", ModelError), ("rtn:int4-g", RecipeError), ("rtm:int4-g32", RecipeError)],
)
def test_a_model_is_untouched_when_quantizing_fails(recipe: str, error: type[Exception]) -> None:
    model = family_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error):
        lowbit.quantize(model, recipe)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_quantized_model_is_not_quantized_again(checkpoint: Path) -> None:
    for model in (lowbit.quantize(family_model("llama"), "rtn:int8-row"), lowbit.load(checkpoint)):
        with pytest.raises((ModelError, CoverageError), match="already quantized"):
            lowbit.quantize(model, "rtn:int4-g32")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_it_generates_what_the_decoded_model_generates(name: str, families: dict[str, Path], make: Any) -> None:
    out = make(families[name], "rtn:int4-g32")
    dense = AutoModelForCausalLM.from_pretrained(families[name], dtype=torch.float32)
    split_experts(dense)
    for site, q in qtensors(out):
        set_matrix(dense.get_submodule(site), q.decode())
    model = lowbit.load(out, dtype=torch.float32)
    prompts = torch.randint(1, 288, (3, 8), generator=torch.Generator().manual_seed(5))
    how = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(prompts), "pad_token_id": 0}
    assert torch.equal(model.generate(prompts, **how), dense.generate(prompts, **how))


def test_kernel_policies_agree_and_are_checked(checkpoint: Path, tokens: torch.Tensor) -> None:
    results = [logits(lowbit.load(checkpoint, dtype=torch.float32, kernels=k), tokens) for k in ("reference", "dense")]
    assert torch.equal(*results)
    model = lowbit.load(checkpoint)
    use_kernels(model, "dense")
    assert {layer.policy for layer in linears(model).values()} == {"dense"}
    with pytest.raises(RecipeError, match="quick"):
        lowbit.load(checkpoint, kernels="quick")


def test_activations_run_in_the_dtype_asked_for(checkpoint: Path, tokens: torch.Tensor) -> None:
    exact = logits(lowbit.load(checkpoint, dtype=torch.float32), tokens)
    rounded = logits(lowbit.load(checkpoint, dtype=torch.bfloat16), tokens[:1, :4])  # kernels for few tokens
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact[:1, :4], rtol=0, atol=0.1 * float(exact.abs().max()))
    assert lowbit.load(checkpoint).dtype == compute_dtype()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_what_save_pretrained_writes_loads_again(
    name: str, families: dict[str, Path], tokens: torch.Tensor, tmp_path: Path, make: Any
) -> None:
    """From memory and from a checkpoint; and again, in many shards."""
    in_memory = lowbit.quantize(family_model(name), "rtn:nf4-dq")
    loaded = lowbit.load(make(families[name], "rtn:nf4-dq"), dtype=torch.float32)
    for i, model in enumerate([in_memory, loaded]):
        model.save_pretrained(tmp_path / f"{i}", max_shard_size=("20KB", "1GB")[i])
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"{i}", dtype=torch.float32)
        assert linears(again).keys() == linears(model).keys()
        assert torch.equal(logits(again, tokens), logits(model, tokens))
    with pytest.raises(CheckpointError, match=r"no lowbit\.json to check"):
        lowbit.load(tmp_path / "0")  # nothing to check its bytes against


def test_a_part_missing_from_what_save_pretrained_wrote_is_named(tmp_path: Path) -> None:
    """transformers fills what is missing with arbitrary numbers."""
    lowbit.quantize(family_model("llama"), "rtn:int4-g32").save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight.scale.data"
    del held[lost]
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=lost):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_native_shard_without_its_manifest_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "lowbit.json").unlink()
    with pytest.raises(CheckpointError, match=r"lowbit\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_site_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    lowbit.quantize(family_model("llama"), "rtn:int4-g32").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["formats"][0]["sites"][0] = "model.layers.9.mlp.up_proj"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.9"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
