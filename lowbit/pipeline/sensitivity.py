"""Sensitivity: what each linear would cost in each format, predicted before anything is quantized.

For a linear ``y = W x`` whose weight gets an error ``dW``, the KL divergence of the changed model from the original is
to second order, with errors of different tokens and of different outputs taken as independent,

    KL a token  =  1/2 E_t sum_o E[(d log p / d y_to)²] (dW x_t)_o²

where labels are drawn from the model's own predictions (Fisher information; no label of the text is used). Squared
gradients are kept as their margins, ``F_o`` over outputs and ``w_t`` over tokens (Kronecker factors, as in K-FAC:
Martens and Grosse, arXiv 1503.05671, but that a token with large inputs may have small gradients):

    KL a token  =  1/2 sum_o F_o (dW G dWᵀ)_oo / tokens,      G = sum_t w_t x_t x_tᵀ

``F`` and ``w`` come from one backward pass, ``G`` from a forward pass, ``dW`` from encoding the weight. An encoder that
fits its inputs (GPTQ) errs less on the tokens it was fitted to than on others, so some windows are held out: it sees
the rest. Blocks are loaded one at a time in both passes, also for the gradients.

What is predicted adds up over linears while errors are small; at 2 bits it is a ranking rather than an amount.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from lowbit.arrays import Float, Tensor
from lowbit.calibration.stats import Gram, Stats
from lowbit.calibration.text import Tokens
from lowbit.errors import CalibrationError
from lowbit.formats.format import Format
from lowbit.formats.presets import preset
from lowbit.methods.base import Encoder, Weight, method
from lowbit.models.graph import matrix
from lowbit.models.source import Source
from lowbit.models.stream import Stream
from lowbit.pipeline.coverage import audit
from lowbit.pipeline.fisher import output_fisher
from lowbit.pipeline.observe import discover
from lowbit.pipeline.recipe import Scalar, parse
from lowbit.pipeline.spill import Hidden

FORMATS = ("int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-g64")
"""The formats that are tried where none are named."""

_ROWS = 128  # rows of a weight, evenly spaced, that are rounded to learn the error of all
_HELD = 8  # windows that are held out, at most; at least a quarter
_LIMIT = 64 << 20  # bytes of a file that is read

Loss = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SiteLoss(_Data):
    """What one linear costs in each format; ``group`` names those that an engine fuses and so keep one format."""

    name: str
    shape: tuple[int, int]
    group: str
    tokens: int = Field(ge=0)
    """calibration tokens that reached it: an expert may see none, and then its losses are 0"""
    loss: dict[str, Loss]


class Sensitivity(_Data):
    """The predicted loss of every linear in every format, and what it was measured on. Saved as JSON."""

    lowbit: Literal["sensitivity"] = "sensitivity"
    version: Literal[1] = 1
    model: str
    model_digest: Hex
    text: str
    text_digest: str
    tokens_digest: Hex
    windows: int = Field(ge=1)
    held: int = Field(ge=1)
    """windows, the first ones, that gradients and errors are taken over; the encoder was fitted to the others"""
    length: int = Field(ge=1)
    dtype: str
    encoder: str
    options: dict[str, Scalar]
    formats: list[str] = Field(min_length=1)
    sites: list[SiteLoss] = Field(min_length=1)

    @model_validator(mode="after")
    def _complete(self) -> Sensitivity:
        if len({site.name for site in self.sites}) < len(self.sites):
            raise ValueError("a site is listed twice")
        for site in self.sites:
            if set(site.loss) != set(self.formats):
                raise ValueError(f"{site.name} has losses for other formats than {', '.join(self.formats)}")
        return self

    def check(self, source: Source) -> None:
        """Raises CalibrationError unless it was measured on this very model."""
        if self.model_digest != source.digest:
            raise CalibrationError(
                f"the sensitivity is that of another model, {self.model}", where=source.name,
                why="losses of other weights say nothing about these", fix="lowbit sensitivity MODEL -o FILE",
            )  # fmt: skip


def read(path: Path) -> Sensitivity:
    """A saved sensitivity; raises CalibrationError for a file that is not one, is cut short or is too large."""
    try:
        if path.stat().st_size > _LIMIT:
            raise CalibrationError(f"larger than {_LIMIT >> 20} MiB", where=str(path), why="no such file is this large")
        return Sensitivity.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CalibrationError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CalibrationError(
            f"is no sensitivity file: {field + ': ' if field else ''}{first['msg']}", where=str(path),
            fix="lowbit sensitivity MODEL -o FILE",
        ) from error  # fmt: skip


def measure(
    source: Source, tokens: Tokens, formats: Sequence[str] = FORMATS, *, dtype: torch.dtype = torch.float32,
    encoder: str = "gptq", options: Mapping[str, Scalar] | None = None, batch: int = 2,
    on_block: Callable[[int, int], object] = lambda _done, _total: None,
) -> Sensitivity:  # fmt: skip
    """The predicted loss of every linear of the blocks in every format (routers apart, which stay in 16 bit).

    ``encoder`` and its ``options`` choose the codes whose errors are measured: best those of the recipe to come, with
    its calibration windows. ``batch`` windows are run at a time; ``on_block`` is told how many of how many steps are
    done.

    Held at once: one block, the hidden states of the tokens, and the statistics of one block (4 bytes * in² for each
    linear and for each different input); for the gradients, the hidden states of a batch before every block. Cost: a
    forward pass over the tokens; three more and a backward pass over a quarter of them, eight windows at most; a
    product of tokens * in² for each input; and the encoding of at most 256 rows of every weight in every format.

    Raises RecipeError for an unknown format, CalibrationError for a single window and when no token reached a group.
    """
    chosen, encode = [preset(name) for name in formats], method(encoder, dict(options or {}))
    sites = {name: site for name, (site, _) in audit(source, parse(f"rtn:{chosen[0].name}")).treated.items()}
    held = min(_HELD, max(1, len(tokens.ids) // 4))
    if held == len(tokens.ids):
        raise CalibrationError(
            "one window cannot be both fitted and held out", where=tokens.text, fix="--samples 8 or more"
        )
    total = (2 * len(tokens.ids[:held].split(batch)) + 1) * len(source.blocks)
    done = 0

    def advanced() -> None:
        nonlocal done
        done += 1
        on_block(done, total)

    fisher = output_fisher(source, tokens.ids[:held], set(sites), dtype, batch, advanced)
    rows: list[SiteLoss] = []
    stream = Stream(source, dtype)
    unseen, fitted = (Hidden.embed(stream, ids, batch) for ids in (tokens.ids[:held], tokens.ids[held:]))
    stream.close()
    for i, name in enumerate(source.blocks):
        block = stream.load(i)
        inside = [site for site in sites if site.startswith(name + ".")]
        inputs = [shared for stage in discover(stream, i, block, unseen, inside) for shared in stage.inputs]
        groups = fused(inputs)
        gram = {
            site: _Weighted(Gram(sites[site].shape[1], stream.device), fisher[site].tokens, tokens.ids[:held].numel())
            for site in inside
            if site in fisher
        }
        stats = {
            shared: Stats.of(shared[0], encode.needs, sites[shared[0]].shape[1], stream.device) for shared in inputs
        }
        _pass(stream, i, block, unseen, {site: into.update for site, into in gram.items()})
        if encode.needs:
            _pass(stream, i, block, fitted, {shared[0]: into.update for shared, into in stats.items()})
        for shared, fit in stats.items():
            for site in shared:
                reached = site in gram and all(kind in fit for kind in encode.needs)
                loss = dict.fromkeys(formats, 0.0)
                if reached:
                    weight = fisher[site].outputs / tokens.ids[:held].numel()
                    loss = _losses(source, site, chosen, gram[site].gram.sum(), weight, encode, fit)
                seen = fisher[site].tokens.numel() if reached else 0
                rows.append(SiteLoss(name=site, shape=sites[site].shape, group=groups[site], tokens=seen, loss=loss))
        advanced()
    _check_reached(rows)
    order = {name: k for k, name in enumerate(sites)}
    return Sensitivity(
        model=source.name, model_digest=source.digest, text=tokens.text, text_digest=tokens.text_digest,
        tokens_digest=tokens.digest, windows=len(tokens.ids), held=held, length=tokens.ids.shape[1],
        dtype=str(dtype).removeprefix("torch."), encoder=encoder, options=dict(options or {}),
        formats=list(formats), sites=sorted(rows, key=lambda row: order[row.name]),
    )  # fmt: skip


def fused(inputs: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """Site -> the name of its group: those that serving engines hold as one matrix, and so in one format.

    ``inputs`` are sites that read one common input. Of these, the ones within one module are fused (q, k and v of an
    attention; gate and up of an MLP; not an attention and the MLP beside it, which parallel blocks feed alike), and
    so is each kind of matrix over all experts of a layer.
    """
    root: dict[str, str] = {}

    def find(kind: str) -> str:
        while root.setdefault(kind, kind) != kind:
            kind = root[kind]
        return kind

    kinds: dict[str, str] = {}
    for shared in inputs:
        first: dict[str, str] = {}
        for site in shared:
            kinds[site] = kind = re.sub(r"\.experts\.\d+\.", ".experts.*.", site)
            root[find(kind)] = find(first.setdefault(kind.rpartition(".")[0], kind))
    members: dict[str, list[str]] = {}
    for kind in dict.fromkeys(kinds.values()):
        members.setdefault(find(kind), []).append(kind)
    names = {r: "+".join([held[0], *(kind.rpartition(".")[2] for kind in held[1:])]) for r, held in members.items()}
    return {site: names[find(kind)] for site, kind in kinds.items()}


class _Weighted:
    """A Gram matrix in which every token has its weight.

    Experts see some of the tokens, and which may differ from the gradients' pass where scores are all but equal; theirs
    are not weighted.
    """

    def __init__(self, gram: Gram, weights: Float[Tensor, "tokens"], whole: int) -> None:
        self.gram = gram
        self._root = weights.sqrt() if weights.numel() == whole else None

    def update(self, x: Float[Tensor, "tokens in"]) -> None:
        x = x.to(torch.float32)
        if self._root is not None:
            x = x * self._root[self.gram.tokens : self.gram.tokens + len(x), None]
        self.gram.update(x)


def _pass(
    stream: Stream, i: int, block: nn.Module, hidden: Hidden, see: Mapping[str, Callable[[Tensor], object]]
) -> None:
    """Move hidden states on to the next block, showing the inputs of linears to those that want them."""
    with contextlib.ExitStack() as hooks:
        for site, update in see.items():
            linear = block.get_submodule(site.removeprefix(stream.source.blocks[i] + "."))
            hooks.callback(linear.register_forward_pre_hook(_shown(update)).remove)
        for windows in hidden.batches():
            hidden.data[windows] = stream.run(i, block, hidden.data[windows])


def _shown(update: Callable[[Tensor], object]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        update(inputs[0].reshape(-1, inputs[0].shape[-1]))

    return hook


def _losses(
    source: Source, site: str, formats: Sequence[Format], G: Float[Tensor, "in in"], weight: Float[Tensor, "out"],
    encoder: Encoder, stats: Stats,
) -> dict[str, float]:  # fmt: skip
    """``1/2 sum_o weight_o (dW G dWᵀ)_oo`` of one site in every format.

    Where rows are rounded independently, a sample of them stands for all, in proportion to their weights.
    """
    W = matrix(source.load(site, torch.float32)).contiguous()
    every = max(1, len(W) // _ROWS)
    found: dict[str, float] = {}
    for fmt in formats:
        rows = slice(None, None, every if fmt.block.follows_rows and weight[::every].any() else 1)
        sample, share = W[rows].contiguous(), weight[rows]
        fisher = share if getattr(encoder, "fisher", False) else None
        error = encoder(Weight(site, sample, fisher=fisher), stats, fmt).decode() - sample
        each = (error @ G).mul_(error).sum(1).clamp_min_(0)
        represented = float(weight.sum()) / max(float(share.sum()), torch.finfo(torch.float32).tiny)
        found[fmt.name] = float(each @ share) / 2 * represented
    return found


def _check_reached(rows: Sequence[SiteLoss]) -> None:
    """Raises CalibrationError for a group of which nothing is known: it would get the fewest bits for no reason."""
    reached = {row.group for row in rows if row.tokens}
    if missing := next((row for row in rows if row.group not in reached), None):
        raise CalibrationError(
            "no calibration token reached this linear", where=missing.group, why="its losses would be made up",
            fix="more calibration text",
        )  # fmt: skip
