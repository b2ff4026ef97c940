"""The readers that ``lowbit check`` asks: our importer, and the packages of others where they are installed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lowbit.arrays import Float, Tensor
from lowbit.formats.qtensor import QTensor
from lowbit.io.check import Found, Reader, Subject
from lowbit.io.opening import Group, open_low_bit
from lowbit.models.graph import is_linear, matrix
from lowbit.models.source import of_directory
from lowbit.models.store import Files, read_json

_NOTHING = "nothing to compare with"
_TORCH = frozenset({"gptq", "gptq-v2", "awq", "compressed-tensors", "bnb", "dense"})


def _ours(subject: Subject) -> Found:
    """Every QTensor and every other tensor as the importer reads them."""
    if subject.layout == "dense":
        return _ours_dense(subject)
    found = open_low_bit(subject.path)
    if subject.reference is None:
        return Found(note=_NOTHING)
    tally = _Tally()
    for expected, group in zip(subject.reference.groups(), found.groups(), strict=True):
        others = dict(_values(group))
        for name, value in _values(expected):
            tally.add(value, others.get(name))
    return tally.found()


def _ours_dense(subject: Subject) -> Found:
    source, tally = of_directory(subject.path), _Tally()
    transposed = _transposed(source.skeleton)
    for group in subject.reference.groups() if subject.reference else ():
        for name, value in _values(group):
            other = source.tensor(name, tuple(_stored_shape(source.skeleton, name)))
            turned = isinstance(value, QTensor) and name.removesuffix(".weight") in transposed
            tally.add(value, other.t() if turned else other)
    return tally.found()


def _transformers(subject: Subject) -> Found:
    """The whole model as ``AutoModelForCausalLM`` loads it, and its logits: in float32, or the next that runs."""
    own = getattr(torch, str(read_json(subject.path / "config.json").get("dtype")), None)
    dtypes = [torch.float32, *(d for d in (own, torch.bfloat16) if isinstance(d, torch.dtype))]
    for dtype in dict.fromkeys(dtypes):
        try:
            model, logits = _loaded(subject, dtype)
            break
        except RuntimeError as error:  # some packages compute in one dtype, whatever the model is loaded in
            failed = error
    else:
        raise failed
    tally = _Tally()
    for group in subject.reference.groups() if subject.reference else ():
        for site, q in group.codes.items():
            if (held := _matrix_of(model, site)) is not None:
                tally.add(q, held)
    found = tally.found(logits)
    name = str(dtype).removeprefix("torch.")
    return found if dtype == torch.float32 else found._replace(note=f"run in {name}; {found.note}".strip("; "))


def _loaded(subject: Subject, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        subject.path, dtype=dtype, local_files_only=True, trust_remote_code=False
    ).eval()
    with torch.inference_mode():
        return model, model(subject.tokens[None]).logits[0].float()


def _compressed_tensors(subject: Subject) -> Found:
    """Each linear through the package's own decompressor for the scheme that config.json gives it."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    held = read_json(subject.path / "config.json")["quantization_config"]
    config = QuantizationConfig.model_validate(held)

    def decompressed(site: str, tensors: Mapping[str, Tensor]) -> Tensor:
        scheme = next(
            s for s in config.config_groups.values() if any(t == "Linear" or match_name(site, t) for t in s.targets)
        )
        codec: Any = BaseCompressor.get_value_from_registry(str(getattr(scheme, "format", None) or config.format))
        return codec.decompress(dict(tensors), scheme)["weight"]  # type: ignore[no-any-return]

    return _site_by_site(subject, decompressed)


def _bitsandbytes(subject: Subject) -> Found:
    """Each linear through the package's own dequantizers."""
    from bitsandbytes import functional

    def dequantized(site: str, tensors: Mapping[str, Tensor]) -> Tensor:
        if "SCB" in tensors:
            return functional.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])  # type: ignore[no-any-return]
        state = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
        held = functional.QuantState.from_dict(state, device=torch.device("cpu"))
        return functional.dequantize_4bit(tensors["weight"], held)  # type: ignore[no-any-return]

    return _site_by_site(subject, dequantized)


def _gguf(subject: Subject) -> Found:
    """Each linear through the dequantizers of the ``gguf`` package, in the places and the order of llama.cpp."""
    from gguf import GGUFReader, dequantize

    from lowbit.io.gguf.names import Names

    tally = _Tally()
    tensors = {t.name: t for t in GGUFReader(subject.path).tensors}
    if subject.reference is None:
        return Found(0, len(tensors), note=_NOTHING)
    names = Names(subject.reference.source)
    for group in subject.reference.groups():
        for site, q in group.codes.items():
            whole = q.decode()
            for place in names.find(f"{site}.weight", q.shape[0]):
                held = tensors[place.name]
                values = torch.from_numpy(dequantize(held.data, held.tensor_type).copy())
                values = values.reshape(*reversed([int(n) for n in held.shape]))
                rows = whole[place.rows] if place.order is None else whole[place.rows][place.order]
                tally.add(rows, values if place.expert is None else values[place.expert])
    return tally.found()


def _llama_cpp(subject: Subject) -> Found:
    """The logits of llama.cpp."""
    from llama_cpp import Llama

    model = Llama(str(subject.path), n_ctx=len(subject.tokens) + 8, logits_all=True, verbose=False, n_threads=1)
    model.eval(subject.tokens.tolist())
    return Found(logits=torch.tensor(model.scores[: len(subject.tokens)]))


def _vllm(subject: Subject) -> Found:
    """Whether vLLM loads and runs it."""
    from vllm import LLM, SamplingParams

    model = LLM(model=str(subject.path), enforce_eager=True, max_model_len=len(subject.tokens) + 16)
    prompt = {"prompt_token_ids": subject.tokens.tolist()}
    model.generate(prompt, SamplingParams(max_tokens=1, temperature=0.0))
    return Found(note="loaded and generated; it shows no matrices")


READERS: tuple[Reader, ...] = (
    Reader("lowbit import", (), _TORCH | {"gguf"}, _ours, ours=True),
    Reader("transformers", (), frozenset({"dense", "lowbit"}), _transformers),
    Reader("transformers (gptq)", ("optimum", "gptqmodel"), frozenset({"gptq", "gptq-v2"}), _transformers),
    Reader("transformers (awq)", ("gptqmodel", "accelerate"), frozenset({"awq"}), _transformers),
    Reader(
        "transformers (compressed-tensors)", ("compressed_tensors",), frozenset({"compressed-tensors"}), _transformers
    ),
    Reader("transformers (bitsandbytes)", ("bitsandbytes", "accelerate"), frozenset({"bnb"}), _transformers),
    Reader("compressed-tensors", ("compressed_tensors",), frozenset({"compressed-tensors"}), _compressed_tensors),
    Reader("bitsandbytes", ("bitsandbytes",), frozenset({"bnb"}), _bitsandbytes),
    Reader("gguf", ("gguf",), frozenset({"gguf"}), _gguf),
    Reader("llama-cpp-python", ("llama_cpp",), frozenset({"gguf"}), _llama_cpp),
    Reader("vLLM", ("vllm",), _TORCH, _vllm),
)


def _site_by_site(subject: Subject, decode: Callable[[str, Mapping[str, Tensor]], Tensor]) -> Found:
    """Give a package the tensors of each linear and compare what it makes of them."""
    files = Files(subject.path)
    names, tally = sorted(files.names()), _Tally()
    for site, expected in subject.matrices():
        tensors = {n.removeprefix(site + "."): files.get(n) for n in names if n.startswith(site + ".")}
        tally.add(expected, decode(site, tensors).reshape(expected.shape))
    return tally.found()


def _values(group: Group) -> Iterator[tuple[str, QTensor | Tensor]]:
    yield from ((f"{site}.weight", q) for site, q in group.codes.items())
    yield from group.dense.items()


class _Tally:
    """Counts matrices that are bit for bit what they should be, in float32 or rounded to the dtype of the reader."""

    def __init__(self) -> None:
        self._equal = self._count = 0
        self._off = 0.0
        self._dtypes: set[str] = set()

    def add(self, expected: QTensor | Tensor, found: QTensor | Tensor | None) -> None:
        self._count += 1
        one = expected.decode() if isinstance(expected, QTensor) else expected.float()
        other = found.decode() if isinstance(found, QTensor) else found
        if other is None or one.shape != other.shape:
            self._off = math.inf
            return
        for dtype in dict.fromkeys((torch.float32, other.dtype, torch.float16, torch.bfloat16)):
            if torch.equal(one.to(dtype).float(), other.float()):
                self._equal += 1
                self._dtypes.add(str(dtype).removeprefix("torch."))
                return
        largest = float(one.abs().max()) or 1.0
        self._off = max(self._off, float((one - other.float()).abs().max()) / largest)

    def found(self, logits: Tensor | None = None) -> Found:
        said = [f"computed in {', '.join(rounded)}"] if (rounded := sorted(self._dtypes - {"float32"})) else []
        said += [f"off by at most {self._off:.1g} of a matrix's largest weight"] if self._off else []
        return Found(self._equal, self._count, logits, "; ".join(said), self._off)


def packed_matrix(module: nn.Module) -> Float[Tensor, "out in"] | None:
    """What the dequantizer of one of GPTQModel's linears makes of its codes, in the dtype of its scales.

    None for other modules, and for fused kernels that have repacked their codes, as those of 16 bit do at a first pass.
    """
    own: Any = module
    if getattr(own, "_cpu_transformed", False):
        return None
    if hasattr(own, "awq_weight_dequantize"):
        return own.awq_weight_dequantize(own.qweight.device, own.scales.dtype).t()  # type: ignore[no-any-return]
    if hasattr(own, "dequantize_weight") and isinstance(getattr(own, "qweight", None), Tensor):
        return own.dequantize_weight().t()  # type: ignore[no-any-return]
    return None


def _matrix_of(model: nn.Module, site: str) -> Float[Tensor, "out in"] | None:
    """The matrix (out, in) of a linear in a loaded model; None where it shows none."""
    parent, _, leaf = site.rpartition(".")
    experts, _, index = parent.rpartition(".")
    with contextlib.suppress(AttributeError):
        module = model.get_submodule(site)
        weight: Any = getattr(module, "weight", None)
        if state := getattr(weight, "quant_state", None):
            from bitsandbytes import functional

            return functional.dequantize_4bit(weight.data, state).float()  # type: ignore[no-any-return]
        if (packed := packed_matrix(module)) is not None:
            return packed
        if (rows := getattr(weight, "SCB", None)) is not None:
            return (weight.data.float() * rows[:, None].float() / 127).float()  # type: ignore[no-any-return]
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 2:
            return matrix(module).detach().float()
        return None
    with contextlib.suppress(AttributeError, ValueError):
        fused: Tensor = getattr(model.get_submodule(experts), leaf)
        return fused[int(index)].detach().float()
    return None


def _stored_shape(model: nn.Module, name: str) -> torch.Size:
    owner, _, leaf = name.rpartition(".")
    held: Tensor = getattr(model.get_submodule(owner), leaf)
    return held.shape


def _transposed(model: nn.Module) -> set[str]:
    """Linears whose module keeps the transpose (``Conv1D``)."""
    return {n for n, module in model.named_modules() if is_linear(module) and matrix(module) is not module.weight}
