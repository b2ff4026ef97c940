"""lm-eval's tasks over a Scorer: the only file that imports lm_eval (the extra ``tasks``).

    results = evaluate(Scorer(model, weights), tokenizer, ["my_task"], include_path=Path("tasks"))

lm-eval chooses, formats and grades; every log-likelihood comes from the Scorer. Its own numbers hold no pairing: for
a comparison of two models, pair the samples of both results.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import EvidenceError, MissingExtra
from lowbit.evaluation.scorer import Scorer

_MAX_LENGTH = 2048  # where a configuration names none, as lm-eval assumes
_MAX_NEW_TOKENS = 256  # where a task names none, as lm-eval assumes


def evaluate(
    scorer: Scorer, tokenizer: Any, tasks: Sequence[str | dict[str, Any]], include_path: Path | None = None,
    limit: int | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Run tasks and return lm-eval's result: ``results``, ``samples``, ``config`` (its model is our identity), ...

    ``tasks`` are names, or task dicts as lm-eval takes them (``custom_dataset`` may be a function); ``include_path``
    is a folder of task files, whose ``data_files`` must be absolute paths; ``limit`` takes the first items of each
    task; ``options`` go to ``lm_eval.simple_evaluate`` (``num_fewshot``, ``apply_chat_template``, ...). lm-eval's own
    index of tasks, seconds to read, is opened only for a name that ``include_path`` lacks. Raises MissingExtra without
    lm-eval, and EvidenceError for ``use_cache``.
    """
    _require()
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(include_path.resolve())
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not {task for task in tasks if isinstance(task, str)} <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder, include_defaults=True)
    # at 0, lm-eval leaves out closed-form errors too
    options = {"bootstrap_iters": 1000, **options}
    model = adapter(scorer, tokenizer)
    found = lm_eval.simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, limit=limit, **options)
    assert found is not None  # it is None on other ranks only, and there are none
    return dict(found)


def adapter(scorer: Scorer, tokenizer: Any) -> Any:
    """The Scorer as an ``lm_eval.api.model.LM``. Raises MissingExtra without lm-eval."""
    _require()
    return _adapter_class()(scorer, tokenizer)


def _require() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtra.of("lm-eval", "tasks")


@functools.cache
def _adapter_class() -> Any:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class LowbitLM(TemplateLM):
        """The three questions of lm-eval, answered by a Scorer."""

        def __init__(self, scorer: Scorer, tokenizer: Any) -> None:
            super().__init__()
            self.scorer, self.tokenizer = scorer, tokenizer
            config = scorer.model.config.get_text_config(decoder=True)
            self.max_length: int = getattr(config, "max_position_embeddings", None) or _MAX_LENGTH

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            """What an empty context is replaced by."""
            bos = self.tokenizer.bos_token_id
            return self.eot_token_id if bos is None else int(bos)

        @property
        def tokenizer_name(self) -> str:
            return str(self.tokenizer.name_or_path).replace("/", "__")

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )  # fmt: skip

        def get_model_info(self) -> dict[str, Any]:
            """What lm-eval writes about the model: a digest, for a name would not tell two versions apart."""
            return {"model": f"lowbit {self.scorer.identity}", "model_sha": self.scorer.weights}

        def set_cache_hook(self, cache_hook: Any) -> None:
            raise EvidenceError(
                "use_cache is refused", where="lm-eval", why="its key has no model, so one model's answers would be "
                "reported as another's", fix="keep the returned results instead",
            )  # fmt: skip

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            """Token ids; a text that begins with the first special token gets no second one."""
            if add_special_tokens is None:
                add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
            return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            found = self.scorer.log_likelihoods([self._fit(context, rest) for _, context, rest in requests])
            return [(float(values.double().sum()), greedy) for values, greedy in found]

        def _fit(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
            """The context cut on the left so that the model can read all but the last token."""
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise EvidenceError(
                    f"a continuation of {len(continuation)} tokens, the model reads {self.max_length}", where="lm-eval",
                    fix="shorter continuations",
                )  # fmt: skip
            return context[-room:], continuation

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """log p of whole texts, each token once, in windows of the model's length."""
            windows: list[tuple[None, list[int], list[int]]] = []
            owners: list[int] = []
            for i, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                    windows.append((None, *make_disjoint_window(pair)))
                    owners.append(i)
            totals = [0.0] * len(requests)
            for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                totals[i] += value
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """What the model writes after each context, up to the first stop; longest contexts first."""
            groups: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
            answers: dict[int, str] = {}
            for members in groups.values():
                settings = dict(normalize_gen_kwargs(requests[members[0]].args[1], _MAX_NEW_TOKENS))
                rows = {i: self.tok_encode(requests[i].args[0]) for i in members}
                order = sorted(members, key=lambda i, rows=rows: -len(rows[i]))  # type: ignore[misc]
                for start in range(0, len(order), self.scorer.batch):
                    batch = order[start : start + self.scorer.batch]
                    written = self._generate([rows[i] for i in batch], dict(settings))
                    answers |= dict(zip(batch, written, strict=True))
            return [answers[i] for i in range(len(requests))]

        def _generate(self, contexts: list[list[int]], settings: dict[str, Any]) -> list[str]:
            new = settings.pop("max_gen_toks")
            stops = [stop for stop in settings.pop("until", []) if stop]
            room = self.max_length - new
            if room < 1:
                raise EvidenceError(f"{new} new tokens, the model reads {self.max_length}", where="lm-eval")
            if not settings.get("temperature"):  # greedy: transformers warns of what would not be used
                settings = {k: v for k, v in settings.items() if k not in ("temperature", "top_p", "top_k")}
            if stops:
                settings |= {"stop_strings": stops, "tokenizer": self.tokenizer}
            contexts = [context[-room:] or [self.prefix_token_id] for context in contexts]
            width = max(map(len, contexts))
            device = self.scorer.model.device
            ids = torch.tensor([[self.eot_token_id] * (width - len(c)) + c for c in contexts], device=device)
            mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=device)
            out = self.scorer.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new, pad_token_id=self.eot_token_id,
                eos_token_id=self.eot_token_id, **settings,
            )  # fmt: skip
            return [_until(self.tokenizer.decode(row, skip_special_tokens=True), stops) for row in out[:, width:]]

    return LowbitLM


def _until(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text
