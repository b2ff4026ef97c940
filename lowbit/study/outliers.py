"""Cells of outlier statistics: of every linear's weights and inputs, and of keys and values, of the original.

outliers    model, text  ->  outliers.json: largest size, spread and kurtosis by layer and kind

The windows are run one at a time, twice: spread and moments first, then what lies beyond six of the spread. Memory is
the model, one window, and a few numbers a channel. Keys are those of the cache, behind the rotation of positions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from lowbit.arrays import Float, Int, Tensor
from lowbit.calibration import text as texts
from lowbit.calibration.synthetic import runnable
from lowbit.errors import EvidenceError, ModelError, StudyError
from lowbit.models.graph import matrix
from lowbit.models.resolve import open_model
from lowbit.models.source import Source
from lowbit.study import stages
from lowbit.study.engine import Cell
from lowbit.study.rows import Member
from lowbit.study.spec import Outliers
from lowbit.study.worker import Stage, StageContext

OUTLIERS = Stage("outliers", "lowbit.study.outliers:outliers", stages.REFERENCE.code)
FILE = "outliers.json"
SIGMAS = 6.0
TOP = 0.01  # of the channels

What = Literal["W", "A", "K", "V"]
"""Weights of a linear, its inputs, keys, values."""
CACHE = "cache"
See = Callable[[What, int, str, Float[Tensor, "rows channels"]], None]


@dataclass(frozen=True)
class Tail:
    """The distribution of one tensor over all its values, and how its channels share the large ones.

    A channel is an input of a linear, or one dimension of a head. A Gaussian has kurtosis 3; a constant is given 0.
    """

    what: What
    layer: int
    kind: str
    """The linear's name inside its block; of keys and values ``cache`` (CACHE)."""
    values: int
    channels: int
    absmax: float
    std: float
    kurtosis: float
    beyond: float
    """Share of the values that lie more than six standard deviations from the mean."""
    held: float | None
    """Share of those that lie in the 1 % of channels (at least one) that have most of them; None without any."""
    peak: float
    """The largest magnitude of a channel over the median channel's; 0 where the median is 0."""

    def __post_init__(self) -> None:
        numbers = (self.absmax, self.std, self.kurtosis, self.beyond, self.peak, self.held or 0.0)
        whole = all(isinstance(n, int) and n >= least for n, least in zip(
            (self.layer, self.values, self.channels), (0, 1, 1), strict=True))  # fmt: skip
        if self.what not in get_args(What) or not (whole and all(math.isfinite(x) and x >= 0 for x in numbers)):
            raise EvidenceError("is no outlier statistic", where=f"{self.what} {self.kind} of layer {self.layer}")


class Spread:
    """Moments, and the largest magnitude of every channel, over values that come in parts; the only mutable object.

    Parts are merged by their central moments (Pébay 2008, SAND2008-6212), which a large mean does not spoil. After
    all parts were taken, ``count`` wants them once more.
    """

    def __init__(self) -> None:
        self.values, self.mean, self._central = 0, 0.0, (0.0, 0.0, 0.0)
        self._largest: Tensor | None = None
        self._beyond: Tensor | None = None

    def take(self, x: Float[Tensor, "rows channels"]) -> None:
        """A part; none of its values are kept."""
        if not x.numel():
            return
        x = x.to(torch.float64)
        mean = float(x.mean())
        off = x - mean
        square = off * off
        n, m, delta = self.values, x.numel(), mean - self.mean
        total = n + m
        a2, a3, a4 = self._central
        b2, b3, b4 = (float(p.sum()) for p in (square, square * off, square * square))
        self._central = (
            a2 + b2 + delta**2 * n * m / total,
            a3 + b3 + delta**3 * n * m * (n - m) / total**2 + 3 * delta * (n * b2 - m * a2) / total,
            a4 + b4 + delta**4 * n * m * (n * n - n * m + m * m) / total**3
            + 6 * delta**2 * (n * n * b2 + m * m * a2) / total**2 + 4 * delta * (n * b3 - m * a3) / total,
        )  # fmt: skip
        self.mean += delta * m / total
        self.values = total
        largest = x.abs().amax(0)
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def count(self, x: Float[Tensor, "rows channels"]) -> None:
        """What of a part lies beyond six standard deviations, by channel."""
        far = ((x.to(torch.float64) - self.mean).abs() > SIGMAS * self.std).sum(0)
        self._beyond = far if self._beyond is None else self._beyond + far

    @property
    def std(self) -> float:
        return math.sqrt(self._central[0] / self.values)

    def tail(self, what: What, layer: int, kind: str) -> Tail:
        """Raises ModelError where a value was not finite."""
        assert self._largest is not None  # only what was taken and counted has a tail
        assert self._beyond is not None
        if not math.isfinite(self._central[2]):
            raise ModelError(
                "values are NaN or infinite", where=f"{what} {kind} of layer {layer}",
                why="no spread exists then", fix="another dtype, or another copy of the model",
            )  # fmt: skip
        variance, far, channels = self._central[0] / self.values, int(self._beyond.sum()), len(self._largest)
        most = self._beyond.sort(descending=True).values[: math.ceil(TOP * channels)]
        median = float(self._largest.median())
        return Tail(
            what, layer, kind, self.values, channels, float(self._largest.max()), math.sqrt(variance),
            self._central[2] / self.values / variance**2 if variance else 0.0, far / self.values,
            float(most.sum()) / far if far else None, float(self._largest.max()) / median if median else 0.0,
        )  # fmt: skip


@dataclass(frozen=True)
class OutlierGrid:
    """The one cell of a model."""

    model: str
    cell: Cell

    @property
    def cells(self) -> list[Cell]:
        return [self.cell]

    @property
    def members(self) -> list[Member]:
        return [Member(self.cell.key, f"{self.model}/outliers")]


def of_model(model: str, common: Mapping[str, Any], settings: Outliers, prefix: str = "") -> OutlierGrid:
    """The cell of one model; ``common`` are the parameters that scored cells share. Runs nothing."""
    shared = {key: common[key] for key in ("model", "model_digest", "dtype", "text", "text_digest")}
    cell = Cell(OUTLIERS, f"{prefix}outliers of {model}", (), {**shared, **settings.model_dump()},
                common["model_digest"])  # fmt: skip
    return OutlierGrid(model, cell)


def outliers(context: StageContext) -> Mapping[str, Any]:
    """Every tail of the original on the first windows of the evaluation's text. Cost: two passes over them."""
    p = context.params
    source, text = open_model(p["model"]), texts.read(p["text"], "evaluation")
    for name, digest, planned in (("model", source.digest, "model_digest"), ("text", text.digest, "text_digest")):
        if digest != p[planned]:
            raise StudyError("changed after this cell was planned", where=p[name], fix="run the study again")
    ids = texts.sample(text, source.tokenizer, p["windows"], p["length"], None).ids
    found = tails(
        source, ids, stages.torch_dtype(p["dtype"]), lambda done, total: context.report(done, total, "windows")
    )
    (context.folder / FILE).write_text(json.dumps([asdict(tail) for tail in found]))
    return {"tails": len(found), "tokens": ids.numel()}


def tails(
    source: Source, ids: Int[Tensor, "windows length"], dtype: torch.dtype,
    on_window: Callable[[int, int], object] = lambda done, total: None,
) -> list[Tail]:  # fmt: skip
    """Weights and inputs of every linear in the blocks, and keys and values, by layer, in the order of the model.

    Weights are looked at in ``dtype``, as they are run. An expert that no token reached has no inputs and is left out
    of A. Raises ModelError for values that are not finite, StudyError for windows longer than the model reads.
    """
    _require_length(source, ids.shape[1])
    model = runnable(source, dtype)
    linears = [
        (layer, site.name.removeprefix(f"{block}."), model.get_submodule(site.name))
        for layer, block in enumerate(source.blocks)
        for site in source.sites(block)
    ]
    found: dict[tuple[What, int, str], Spread] = {}

    def take(what: What, layer: int, kind: str, x: Float[Tensor, "rows channels"]) -> None:
        found.setdefault((what, layer, kind), Spread()).take(x)

    def count(what: What, layer: int, kind: str, x: Float[Tensor, "rows channels"]) -> None:
        found[what, layer, kind].count(x)

    for turn, see in enumerate((take, count)):
        for layer, kind, module in linears:
            see("W", layer, kind, matrix(module))
        for done, window in enumerate(ids, 1):
            _look(model, linears, window, see)
            on_window(done + turn * len(ids), 2 * len(ids))
    order = get_args(What)
    ranked = sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    return [spread.tail(*key) for key, spread in ranked if spread.values]


def _look(
    model: PreTrainedModel, linears: Sequence[tuple[int, str, nn.Module]], window: Int[Tensor, "length"], see: See
) -> None:
    """What goes into the linears while the model reads one window, and the keys and values that it keeps of it."""
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, layer=layer, kind=kind: see("A", layer, kind, given[0].reshape(-1, given[0].shape[-1]))
        )
        for layer, kind, module in linears
    ]
    cache = DynamicCache()  # without the model's configuration no layer forgets what a sliding window passed
    try:
        with torch.inference_mode():
            model.base_model(input_ids=window[None], past_key_values=cache, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    layers: list[Any] = cache.layers
    if not all(hasattr(held, "keys") for held in layers) or not layers:
        raise ModelError("keeps no keys and values between tokens", where=type(model).__name__, fix="another model")
    for layer, held in enumerate(layers):  # keys and values are (1, heads, tokens, d)
        see("K", layer, CACHE, held.keys[0].transpose(0, 1).flatten(1))
        see("V", layer, CACHE, held.values[0].transpose(0, 1).flatten(1))


def read(folder: Path) -> list[Tail]:
    """The tails that a cell left in its folder. Raises EvidenceError for a file that is not such evidence."""
    try:
        return [Tail(**row) for row in json.loads((folder / FILE).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise EvidenceError(f"is no outlier evidence: {error}", where=str(folder / FILE)) from error


def _require_length(source: Source, length: int) -> None:
    longest = getattr(source.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise StudyError(
            f"windows of {length} tokens, the model reads at most {longest}", where="[outliers]",
            fix=f"length = {longest}",
        )  # fmt: skip
