"""Scorer: the only door from models to numbers.

    scorer = Scorer(model, identity)
    reference = scorer.reference(windows)               # once a study
    tokens = candidate_scorer.score(windows, reference) # one forward pass a candidate; exact KL

Logits exist for a few positions at a time; everything else about an evaluation is a function of what is returned.
A model that is never whole in memory is scored by ``by_blocks.BlockScorer``, which differs in where hidden states come
from and in nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from lowbit import digest
from lowbit.arrays import Float, Int, Tensor
from lowbit.errors import EvidenceError
from lowbit.evaluation import prefix
from lowbit.evaluation.evidence import Provenance, Reference, empty_columns
from lowbit.evaluation.generation import Limits, Written, end_tokens, greedy
from lowbit.evaluation.head import Head, final_hidden
from lowbit.evaluation.metrics.base import Tokens
from lowbit.evaluation.protocol import Windows, in_chunks
from lowbit.formats.heads import CacheFormat
from lowbit.runtime.decoding import prepared
from lowbit.runtime.linear import QLinear

ROWS = 128  # positions projected to the vocabulary at a time


class WindowScorer(ABC):
    """Scores windows of a text; where the model is, and how its hidden states are computed, is left open.

    ``structure`` is the model, its weights in memory or not; ``weights`` the digest of their bytes.
    """

    def __init__(self, structure: PreTrainedModel, weights: str, batch: int, kv: CacheFormat | None, chunk: int | None):
        if kv is not None and chunk is None:
            raise EvidenceError(
                "a KV format without a chunk", where=str(kv), why="in one pass over a window no cache is ever read",
                fix="chunk=64, or a protocol such as windows-1024/chunk-64",
            )  # fmt: skip
        if chunk is not None and chunk < 1:
            raise EvidenceError(f"a chunk of {chunk} tokens", fix="chunk=1 runs token by token")
        self.structure, self.weights, self.batch, self.kv, self.chunk = structure, weights, batch, kv, chunk

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What the model computes in."""

    @property
    def identity(self) -> str:
        """Digest of all that can change a number: weights, dtype, kernels, attention, device, batch, cache, inputs."""
        return digest.of_value([self.weights, str(self.dtype), self._run()])

    def _run(self) -> list[Any]:
        linears = [m for m in self.structure.modules() if isinstance(m, QLinear)]
        policies = sorted({m.policy for m in linears})
        rounding = sorted({m.input.format.name for m in linears if m.input is not None})
        attention = self.structure.config._attn_implementation
        kv = None if self.kv is None else str(self.kv)
        return [policies, rounding, attention, self._device, self.batch, kv, self.chunk, torch.__version__]

    @property
    def words(self) -> Float[Tensor, "vocab d"]:
        """The matrix of the head; of a model that is not in memory, its shape."""
        weight: Tensor = self.structure.get_output_embeddings().weight
        return weight

    @property
    @abstractmethod
    def _device(self) -> str: ...

    @abstractmethod
    def _head(self, sample: Int[Tensor, "length"]) -> Head:
        """The model's head, checked against the model's own logits."""

    @abstractmethod
    def _final(self, windows: Windows) -> Iterable[Float[Tensor, "batch length d"]]:
        """Final hidden states of all windows, ``batch`` at a time, in order."""

    def _place(self, *shape: int) -> Tensor:
        """Where hidden states are kept."""
        return torch.empty(shape, dtype=self.dtype)

    @torch.inference_mode()
    def reference(self, windows: Windows, on_tokens: Callable[[int], None] = lambda _: None) -> Reference:
        """Score as the reference of a study: its hidden states are kept, KL to itself is zero."""
        states, columns = self._final(windows), _places(windows)  # before the head: both need not fit at once
        head = self._head(windows.ids[0, :8])
        hidden = self._place(windows.scored, head.weight.shape[1])
        normalizer, scratch = torch.empty(windows.scored), _scratch(head)
        for rows, h, targets in self._rows(windows, states):
            hidden[rows] = h
            logits = head(h)
            first, weights, total, log_z = _softmax(logits, scratch)
            expected = weights.mul_(logits).sum(-1) / total
            target = _pick(logits, targets)
            p_first = torch.exp(_pick(logits, first) - log_z)
            second = logits.scatter_(1, first[:, None], -torch.inf).amax(-1)
            columns["nll"][rows] = columns["nll_ref"][rows] = log_z - target
            columns["top1"][rows] = columns["top1_ref"][rows] = first.to(torch.int32)
            columns["top1_p"][rows] = p_first
            columns["margin"][rows] = columns["margin_ref"][rows] = p_first - torch.exp(second - log_z)
            columns["entropy_ref"][rows] = log_z - expected
            normalizer[rows] = log_z
            on_tokens(len(targets))
        provenance = self._provenance(windows, self.identity)
        return Reference(hidden, head, normalizer, _tokens(columns), provenance)

    @torch.inference_mode()
    def score(
        self, windows: Windows, reference: Reference, on_tokens: Callable[[int], None] = lambda _: None
    ) -> tuple[Tokens, Provenance]:
        """Score beside a reference: paired, with the exact KL(reference || this) at every token, in nats.

        Raises EvidenceError when the reference scored other tokens.
        """
        if reference.provenance.windows != windows.digest:
            raise EvidenceError("the reference scored other tokens", where=windows.text, fix="score it on this text")
        if len(self.words) != len(reference.head.weight):
            raise EvidenceError(
                f"vocabularies of {len(self.words)} and {len(reference.head.weight)} do not compare",
                fix="a candidate with the reference's tokenizer",
            )  # fmt: skip
        states, columns = self._final(windows), _places(windows)
        head = self._head(windows.ids[0, :8])
        reference_head, scratch = reference.head.beside(head), _scratch(head)
        for name in ("nll_ref", "top1_ref", "margin_ref", "entropy_ref"):
            columns[name] = torch.from_numpy(getattr(reference.tokens, name).copy())
        for rows, h, targets in self._rows(windows, states):
            logits = head(h)
            first, _, _, log_z = _softmax(logits, scratch)
            columns["nll"][rows] = log_z - _pick(logits, targets)
            columns["top1"][rows] = first.to(torch.int32)
            columns["top1_p"][rows] = p_first = torch.exp(_pick(logits, first) - log_z)
            # KL = E_ref[l_ref - l] - (log Z_ref - log Z): one expectation over the vocabulary
            logits_ref = reference_head(reference.hidden[rows].to(h.device))
            log_z_ref = reference.log_normalizer[rows].to(h.device)
            p_ref = torch.sub(logits_ref, log_z_ref[:, None], out=scratch[: len(h)]).exp_()
            gap = p_ref.mul_(logits_ref.sub_(logits)).sum(-1)
            columns["kl"][rows] = (gap - (log_z_ref - log_z)).clamp_min_(0)  # rounding must not make it negative
            second = logits.scatter_(1, first[:, None], -torch.inf).amax(-1)  # last: it spoils the logits
            columns["margin"][rows] = p_first - torch.exp(second - log_z)
            on_tokens(len(targets))
        return _tokens(columns), self._provenance(windows, reference.provenance.reference)

    def _rows(self, windows: Windows, states: Iterable[Tensor]) -> Iterator[_Rows]:
        """Final hidden states at the positions before every scored token, a few rows at a time, and the targets."""
        done, length, window = 0, windows.ids.shape[1], 0
        for batch in states:
            for h in batch:
                row, first = windows.ids[window], int(windows.first[window])
                for at in range(first, length, ROWS):
                    stop = min(at + ROWS, length)
                    yield _Rows(slice(done, done + stop - at), h[at - 1 : stop - 1], row[at:stop])
                    done += stop - at
                window += 1

    def _provenance(self, windows: Windows, reference: str) -> Provenance:
        return Provenance(
            self.identity, reference, windows.digest, in_chunks(windows.protocol, self.chunk), windows.text,
            windows.text_digest, str(self.dtype).removeprefix("torch."),
        )  # fmt: skip


class Scorer(WindowScorer):
    """A model ready to be scored. ``weights`` is the digest of its bytes; names do not enter its identity.

    With ``chunk``, windows are run through the cache, so many tokens at a time; ``kv`` says how keys and values are
    rounded in it. Raises EvidenceError for a KV format without a chunk, and a chunk below 1.
    """

    def __init__(
        self, model: PreTrainedModel, weights: str, *,
        batch: int = 1, kv: CacheFormat | None = None, chunk: int | None = None,
    ) -> None:  # fmt: skip
        if prepared(model):
            raise EvidenceError(
                "is prepared for decoding", where=type(model).__name__,
                why="its last digits are not those that the identity of its scores stands for",
                fix="lowbit.runtime.decoding.restore(model), or load it again",
            )  # fmt: skip
        super().__init__(model, weights, batch, kv, chunk)
        self.model = model.eval()
        self._checked = False

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @torch.inference_mode()
    def log_likelihoods(
        self, sequences: list[tuple[list[int], list[int]]], on_done: Callable[[int], object] = lambda _: None
    ) -> list[tuple[Float[Tensor, "tokens"], bool]]:
        """For each (context, continuation): log p of every continuation token, and whether greedy says the same.

        What sequences begin with in common (few-shot examples, the question of several choices) is run once, see
        prefix.py; with a chunk, or a model whose cache holds more than keys and values, every distinct input is run by
        itself. ``on_done`` is told how many are done since. Raises EvidenceError for an empty context or continuation.
        """
        if not all(context and continuation for context, continuation in sequences):
            raise EvidenceError("a context or continuation has no tokens", fix="a first token, such as the tokenizer's")
        if not sequences:
            return []
        head = self._head(torch.tensor(sequences[0][0][:8]))
        if self.chunk is None and prefix.shareable(self.model.config):
            asked = prefix.shared(self.model, sequences, self.batch)
        else:
            asked = prefix.whole(self._states, sequences, self.batch)
        return prefix.follow(head, asked, [continuation for _, continuation in sequences], on_done)

    def generate(
        self,
        prompts: list[list[int]],
        tokenizer: Any,
        limits: Limits,
        on_done: Callable[[int], object] = lambda _: None,
    ) -> list[Written]:
        """What the model writes greedily after each prompt (token ids, at least one), see generation.py."""
        head = self._head(torch.tensor(prompts[0][:8]))
        return greedy(self.model, head, tokenizer, prompts, limits, batch=self.batch, kv=self.kv, on_done=on_done)

    def ends(self, tokenizer: Any) -> frozenset[int]:
        """The tokens that end a text of this model."""
        return end_tokens(self.model, tokenizer)

    def _head(self, sample: Int[Tensor, "length"]) -> Head:
        """The model's head, checked once against the model's own logits on a few tokens."""
        if not self._checked:
            Head.of(self.model, sample[None])
            self._checked = True
        return Head.unchecked(self.model)

    @property
    def _device(self) -> str:
        return str(self.model.device)

    def _final(self, windows: Windows) -> Iterable[Float[Tensor, "batch length d"]]:
        return (self._states(ids) for ids in windows.ids.split(self.batch))

    def _states(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length d"]:
        return final_hidden(self.model, ids.to(self.model.device), self.chunk, self.kv)


class _Rows(NamedTuple):
    rows: slice
    hidden: Tensor
    targets: Tensor


class _Softmax(NamedTuple):
    first: Tensor
    """The most likely token."""
    weights: Tensor
    """exp(l - max l)"""
    total: Tensor
    """The sum of the weights."""
    log_z: Tensor
    """log sum exp l"""


def _places(windows: Windows) -> dict[str, Tensor]:
    """Columns with the place of every scored token filled in; a window is a document of its own."""
    columns = empty_columns(windows.scored)
    length, done = windows.ids.shape[1], 0
    for w, (row, first) in enumerate(zip(windows.ids, windows.first.tolist(), strict=True)):
        part = slice(done, done + length - first)
        columns["doc"][part] = columns["chunk"][part] = w
        columns["pos"][part] = torch.arange(first, length, dtype=torch.int32)
        columns["token"][part] = row[first:].to(torch.int32)
        done += length - first
    return columns


def _tokens(columns: dict[str, Tensor]) -> Tokens:
    return Tokens.of({name: column.numpy() for name, column in columns.items()})


def _pick(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    return logits.gather(1, targets.to(logits.device)[:, None])[:, 0]


def _scratch(head: Head) -> Float[Tensor, "rows vocab"]:
    """Room for one piece of logits, used again and again: fresh pages cost as much as the arithmetic on them."""
    return torch.empty(ROWS, head.weight.shape[0], device=head.weight.device)


def _softmax(logits: Float[Tensor, "tokens vocab"], scratch: Float[Tensor, "rows vocab"]) -> _Softmax:
    """In one exponential a logit, its weights in ``scratch``; torch's logsumexp and topk cost four times as much."""
    first = logits.argmax(-1)
    highest = _pick(logits, first)
    weights = torch.sub(logits, highest[:, None], out=scratch[: len(logits)]).exp_()
    total = weights.sum(-1)
    return _Softmax(first, weights, total, highest + torch.log(total))
