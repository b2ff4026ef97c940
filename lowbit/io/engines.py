"""Will it load? What engines accept of each layout, as data, and one function that asks it.

    will_load(Files("gptq", bits=3, group=128, symmetric=True))

Rules are read in order, and the first that fits decides for its engine and versions. They say what the engines' own
code and issues say (``source``); what runs here, ``lowbit check`` says. docs/reference/engines.md shows them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lowbit.formats.blocks import Block
from lowbit.formats.spec import Spec
from lowbit.io.opening import LowBit

Answer = Literal["yes", "slow", "no"]
ROW = -1
"""The group size of one scale a row."""


@dataclass(frozen=True)
class Files:
    """What an engine looks at before it loads: one kind of linear in one layout."""

    layout: str
    bits: int
    group: int = ROW
    symmetric: bool = True
    act_order: bool = False
    float_codes: bool = False
    """Floating-point codes: fp8, fp4."""
    rounded_inputs: bool = False
    architecture: str = ""
    """``LlamaForCausalLM``; where it is not said, rules about architectures do not apply."""
    experts: bool = False
    """Experts of a mixture among the linears."""


@dataclass(frozen=True)
class Rule:
    """An engine's answer to files that fit; a field that is None, or empty, fits all."""

    engine: str
    versions: str
    layouts: tuple[str, ...]
    answer: Answer
    why: str
    source: str
    bits: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    symmetric: bool | None = None
    act_order: bool | None = None
    float_codes: bool | None = None
    rounded_inputs: bool | None = None
    experts: bool | None = None
    architectures: tuple[str, ...] = ()

    def fits(self, files: Files) -> bool:
        wanted = {
            "symmetric": self.symmetric, "act_order": self.act_order, "float_codes": self.float_codes,
            "rounded_inputs": self.rounded_inputs, "experts": self.experts,
        }  # fmt: skip
        return (
            files.layout in self.layouts
            and (not self.bits or files.bits in self.bits)
            and (not self.groups or files.group in self.groups)
            and (not self.architectures or files.architecture in self.architectures)
            and all(value is None or getattr(files, name) is value for name, value in wanted.items())
        )

    def condition(self) -> str:
        """What the files must be for this rule, in words."""
        words = {
            "symmetric": ("symmetric", "asymmetric"), "act_order": ("act-order", "no act-order"),
            "float_codes": ("floating-point codes", "integer codes"),
            "rounded_inputs": ("rounded inputs", "weights only"), "experts": ("experts", "no experts"),
        }  # fmt: skip
        said = []
        if self.bits:
            said.append(f"{', '.join(map(str, self.bits))} bits")
        if self.groups:
            said.append("groups of " + ", ".join("a row" if g == ROW else str(g) for g in self.groups))
        for name, (yes, no) in words.items():
            if (value := getattr(self, name)) is not None:
                said.append(yes if value else no)
        said += self.architectures
        return "; ".join(said) or "anything else"


@dataclass(frozen=True)
class Verdict:
    """What one engine will make of the files."""

    engine: str
    versions: str
    answer: Answer
    why: str
    source: str


def will_load(files: Files) -> list[Verdict]:
    """What every engine that knows the layout answers, in the order of the rules; pure."""
    found: dict[tuple[str, str], Verdict] = {}
    for rule in RULES:
        if rule.fits(files):
            found.setdefault(
                (rule.engine, rule.versions), Verdict(rule.engine, rule.versions, rule.answer, rule.why, rule.source)
            )
    return list(found.values())


def expected(model: LowBit, layout: str) -> list[Verdict]:
    """The worst answer of every engine over all kinds of linears in ``model``, once it is written in ``layout``."""
    architecture = type(model.source.skeleton).__name__
    kinds = {
        replace(files_of(spec, layout), rounded_inputs=site in model.inputs, architecture=architecture,
                experts=".experts." in site)
        for site, spec in model.specs.items()
    }  # fmt: skip
    worst: dict[tuple[str, str], Verdict] = {}
    for files in sorted(kinds, key=repr):
        for verdict in will_load(files):
            key = (verdict.engine, verdict.versions)
            if key not in worst or _ORDER.index(verdict.answer) > _ORDER.index(worst[key].answer):
                worst[key] = verdict
    return list(worst.values())


def files_of(spec: Spec, layout: str) -> Files:
    """What engines see of one linear, but for its place in the model."""
    act_order = spec.node == "Gathered"
    inner = spec.child("inner") if act_order else spec
    assert inner is not None  # a Gathered has one
    codes = inner.leaf("codes")
    levels = codes.levels if codes is not None and codes.levels else 256
    block = Block.parse(inner.get("block")) if inner.get("block") else Block("row")
    group = block.size[0] if block.kind in ("group", "flat") else ROW
    stored_zero = inner.leaf("zero") is not None or inner.child("zero") is not None
    return Files(
        layout.partition(":")[0], (levels - 1).bit_length(), group, inner.node == "Affine" and not stored_zero,
        act_order, inner.node == "Lookup",
    )  # fmt: skip


def warnings(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """A sentence for every engine that will not load the files, or slowly."""
    said = {"no": "will not load it", "slow": "loads it without its fast kernels"}
    return tuple(f"{v.engine} ({v.versions}) {said[v.answer]}: {v.why}" for v in verdicts if v.answer != "yes")


_ORDER: tuple[Answer, ...] = ("yes", "slow", "no")
_GPTQ = ("gptq", "gptq-v2")
_MARLIN = (ROW, 32, 64, 128)
_CONV1D = ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel")
_OLD, _NEW = "up to 2026-05", "since #45051 (2026)"
_V1 = "reads v2 zeros as v1 and computes nonsense without an error"
_SCALED = (
    "GPTNeoXForCausalLM", "FalconForCausalLM", "BloomForCausalLM", "GPTJForCausalLM", "MptForCausalLM",
    "GPTBigCodeForCausalLM", "Starcoder2ForCausalLM",
)  # fmt: skip
_EXPERTS = "experts, which it fuses, keep random weights, with a warning and no error"

RULES: tuple[Rule, ...] = (
    # vLLM, GPTQ
    Rule("vLLM", _NEW, ("gptq-v2",), "no", _V1, "vllm #26343", symmetric=False),
    Rule("vLLM", _NEW, _GPTQ, "no", "2- and 3-bit GPTQ was dropped", "vllm #45051", bits=(2, 3)),
    Rule("vLLM", _NEW, _GPTQ, "no", "GPTQ must be symmetric with 4 or 8 bits", "vllm auto_gptq.py", symmetric=False),
    Rule(
        "vLLM", _NEW, _GPTQ, "no", "act-order with groups is refused", "vllm 0.33 auto_gptq.py", groups=(32, 64, 128),
        act_order=True,
    ),
    Rule("vLLM", _NEW, _GPTQ, "yes", "Marlin kernels", "vllm auto_gptq.py", bits=(4, 8), groups=_MARLIN),
    Rule("vLLM", _NEW, _GPTQ, "no", "groups must be of 32, 64 or 128 inputs, or a row", "vllm auto_gptq.py"),
    Rule("vLLM", _OLD, ("gptq-v2",), "no", _V1, "vllm #26343", symmetric=False),
    Rule(
        "vLLM", _OLD, _GPTQ, "yes", "Marlin kernels", "vllm gptq_marlin.py", bits=(4, 8), groups=_MARLIN, symmetric=True
    ),
    Rule("vLLM", _OLD, _GPTQ, "slow", "the older exllama kernels, float16 only", "vllm gptq.py", bits=(2, 3, 4, 8)),
    # vLLM, AWQ
    Rule("vLLM", "any", ("awq",), "yes", "Marlin kernels", "vllm awq_marlin.py", bits=(4,), groups=_MARLIN),
    Rule("vLLM", "any", ("awq",), "slow", "groups other than 32, 64, 128 or a row", "vllm awq.py", bits=(4,)),
    # vLLM, compressed-tensors
    Rule(
        "vLLM", "any", ("compressed-tensors",), "yes", "8-bit weights and inputs", "vllm compressed_tensors",
        bits=(8,), rounded_inputs=True,
    ),
    Rule("vLLM", "any", ("compressed-tensors",), "yes", "fp8, fp4", "vllm compressed_tensors", float_codes=True),
    Rule(
        "vLLM", "any", ("compressed-tensors",), "yes", "weight-only, Marlin kernels",
        "vllm compressed_tensors_wNa16.py", bits=(4, 8), rounded_inputs=False,
    ),
    Rule(
        "vLLM", "before Humming kernels (#46389)", ("compressed-tensors",), "no",
        "only 4- and 8-bit weights have kernels", "vllm #34556", bits=(2, 3, 5, 6, 7),
    ),
    Rule(
        "vLLM", "with Humming kernels (#46389)", ("compressed-tensors",), "yes", "weight-only of any width",
        "vllm #46389", bits=(2, 3, 5, 6, 7),
    ),
    # vLLM, the rest
    Rule("vLLM", "before #39583 is carried out", ("bnb",), "yes", "in-tree", "vllm #39583"),
    Rule("vLLM", "after #39583", ("bnb",), "no", "bitsandbytes leaves the tree", "vllm #39583"),
    Rule("vLLM", "before #39612", ("gguf",), "slow", "GGUF is not its fast path", "vllm #39612"),
    Rule("vLLM", "since #39612", ("gguf",), "no", "needs the vllm-gguf-plugin", "vllm #39612"),
    Rule("vLLM", "any", ("bf16", "fp16", "fp32"), "yes", "plain weights", "vllm"),
    # transformers
    Rule(
        "transformers", ">=5, with gptqmodel and optimum", _GPTQ, "no",
        "its linears are of a class of their own, and keep random weights, with a warning and no error",
        "run with 5.23 and GPTQModel 7.7", architectures=("FalconForCausalLM",),
    ),
    Rule(
        "transformers", ">=5, with gptqmodel", ("awq",), "no",
        "it wants scales of the activation (mlp.act.scales), as AutoAWQ writes them, and computes NaN without",
        "run with 5.23 and GPTQModel 7.7", architectures=_SCALED,
    ),
    Rule(
        "transformers", ">=5, with gptqmodel and optimum", _GPTQ, "no", _EXPERTS, "run with 5.23 and GPTQModel 7.7",
        experts=True,
    ),
    Rule("transformers", ">=5, with gptqmodel", ("awq",), "no", _EXPERTS, "run with 5.23 and GPTQModel 7.7",
         experts=True),
    Rule(
        "transformers", ">=5, with gptqmodel and optimum", _GPTQ, "yes", "GPTQModel's kernels, asymmetric v1 included",
        "run with 5.23 and GPTQModel 7.7",
    ),
    Rule(
        "transformers", ">=5, with gptqmodel", ("awq",), "yes", "GPTQModel's kernels",
        "run with 5.23 and GPTQModel 7.7", bits=(4,),
    ),
    Rule(
        "transformers", ">=5, with compressed-tensors", ("compressed-tensors",), "no",
        "its linears are Conv1D, which the package does not load", "run with 5.23", architectures=_CONV1D,
    ),
    Rule(
        "transformers", ">=5, with compressed-tensors", ("compressed-tensors",), "no",
        "it fuses experts while it loads, which it cannot do with codes", "run with 5.23", experts=True,
    ),
    Rule(
        "transformers", ">=5, with compressed-tensors before 0.16 (2026-05-29)", ("compressed-tensors",), "no",
        "codes of 3, 5, 6 or 7 bits were packed otherwise", "compressed-tensors #715", bits=(3, 5, 6, 7),
    ),
    Rule(
        "transformers", ">=5, with compressed-tensors", ("compressed-tensors",), "yes", "dense or compressed linears",
        "quantizer_compressed_tensors.py",
    ),
    Rule(
        "transformers", ">=5, with bitsandbytes", ("bnb",), "no", "its linears are Conv1D", "run with 5.23",
        architectures=_CONV1D,
    ),
    Rule(
        "transformers", ">=5, with bitsandbytes", ("bnb",), "no", "its linears are of a class of their own",
        "run with 5.23", architectures=("FalconForCausalLM",),
    ),
    Rule(
        "transformers", ">=5, with bitsandbytes", ("bnb",), "no",
        "it fuses experts while it loads, which it cannot do with codes", "run with 5.23", experts=True,
    ),
    Rule("transformers", ">=5, with bitsandbytes", ("bnb",), "yes", "CPU and GPU", "quantizer_bnb_4bit.py"),
    Rule("transformers", "any", ("bf16", "fp16", "fp32"), "yes", "plain weights", "transformers"),
    # GPTQModel, AutoAWQ
    Rule(
        "GPTQModel", "any", ("gptq",), "no",
        "its own loader takes asymmetric v1 files from itself alone; gptq-v2 it reads", "run with 7.7",
        symmetric=False,
    ),
    Rule("GPTQModel", "any", _GPTQ, "yes", "the layout's home", "GPTQModel", bits=(2, 3, 4, 8)),
    Rule("AutoAWQ", "0.2", ("awq",), "yes", "the layout's home; no longer maintained", "AutoAWQ", bits=(4,)),
    # llama.cpp
    Rule(
        "llama.cpp", "any", ("gguf",), "no", "it has no OPT", "llama.cpp", architectures=("OPTForCausalLM",)
    ),
    Rule("llama.cpp", "any", ("gguf",), "yes", "the layout's home", "llama.cpp"),
)  # fmt: skip
