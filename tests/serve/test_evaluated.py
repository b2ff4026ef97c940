"""Scores that come over HTTP are the Scorer's own; and the OpenAPI document says what the server does."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import Address
from transformers import PreTrainedTokenizerFast

from lowbit.evaluation import lmeval
from lowbit.evaluation.scorer import Scorer

needs_lm_eval = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "tenacity", "aiohttp", "requests")),
    reason="lm-eval[api] is not installed",
)
PAIRS = [("", "stone"), ("river ", "stone"), ("quiet morning", " ice"), ("seven lamps under", " the"), ("a", "b")]


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("many", [1, 3])
def test_lm_eval_over_http_gives_the_scorers_log_likelihoods(
    many: int, address: Address, low_bit: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Any
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    tokenizer.save_pretrained(tmp_path)
    theirs = LocalCompletionsAPI(
        base_url=f"{address.url}/v1/completions", model="low", tokenizer=str(tmp_path), batch_size=many, max_length=128,
        max_retries=1,
    )  # fmt: skip
    ours = lmeval.adapter(Scorer(low_bit, "w"), tokenizer)
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate([*PAIRS, ("river " * 40, "stone")])]
    found = theirs.loglikelihood(asked, disable_tqdm=True)
    wanted = ours.loglikelihood(asked, disable_tqdm=True)
    assert [v for v, _ in found[:-1]] == pytest.approx([v for v, _ in wanted[:-1]], abs=1e-4)
    assert [bool(g) for _, g in found] == [bool(g) for _, g in wanted]
    assert found[-1][0] == pytest.approx(wanted[-1][0], abs=0.5)  # it keeps one token less of a context cut short


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_the_openapi_document_is_true(mode: GenerationMode, address: Address) -> None:
    """Every answer has a status, a type and a shape of the document, and what breaks the document is refused.

    What keeps to it may still be refused: a model that is not here, a prompt that is too long.
    """
    schema, tried = schemathesis.openapi.from_url(f"{address.url}/openapi.json"), Counter[str]()
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]  # an invalid document raises here

        @settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=mode))
        def probe(case: Any) -> None:
            case.call_and_validate(excluded_checks=[positive_data_acceptance])
            tried[case.path] += 1

        try:
            probe()
        except Unsatisfiable:
            assert not operation.body, "a body can always be broken; a path without parameters cannot"
    assert tried["/v1/completions"] >= 4 <= tried["/v1/chat/completions"]
