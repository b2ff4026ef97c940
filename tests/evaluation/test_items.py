"""Items keep what they promise: shapes, choices, probabilities, pairing, and their file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special

from lowbit.errors import EvidenceError
from lowbit.evaluation import statistics as st
from lowbit.evaluation import task_findings
from lowbit.evaluation.metrics import items as module
from lowbit.evaluation.metrics.items import BIASED, COUNTER, UNRELATED, Items, ItemsProvenance, read_items, write_items
from lowbit.evaluation.tasks import measures

PROVENANCE = ItemsProvenance("m", "r", "task", "digest", "tokenizer", "float32")


def made(n: int = 40, choices: int = 3, seed: int = 0, **changes: Any) -> Items:
    """Random items of that many choices, the first of them right."""
    rng = np.random.default_rng(seed)
    logprob = rng.normal(-8, 2, n * choices).astype(np.float32)
    pred = logprob.reshape(n, choices).argmax(1)
    empty = [""] * n
    columns: dict[str, Any] = {
        "id": [f"q{i}" for i in range(n)], "group": empty, "cluster": np.arange(n), "doc_hash": empty,
        "prompt_hash": empty, "starts": np.arange(n + 1) * choices, "logprob": logprob,
        "tokens": rng.integers(1, 5, n * choices), "chars": rng.integers(1, 20, n * choices),
        "true": np.arange(n * choices) % choices == 0, "role": np.zeros(n * choices), "pred": pred,
        "gold": np.zeros(n), "score": pred == 0, "margin": np.full(n, 0.5), "length": np.zeros(n),
        "stop_reason": empty, "parse_ok": np.ones(n), "answer": empty, "text": empty,
        "written_starts": np.zeros(n + 1), "written": [],
    }  # fmt: skip
    return Items.of(columns | changes)


def test_choices_and_probabilities_by_their_definition() -> None:
    items = made()
    table = items.logprob.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(items.probabilities().reshape(-1, 3), special.softmax(table, axis=1))
    np.testing.assert_allclose(items.true_mass(), special.softmax(table, axis=1)[:, 0])
    for per, lengths in (("token", items.tokens), ("char", items.chars)):
        normal = table / lengths.reshape(-1, 3)
        assert (items.choice(per) == normal.argmax(1)).all()
        assert (items.correct(per) == (normal.argmax(1) == 0)).all()
    with pytest.raises(EvidenceError, match="no normalisation 'byte'"):
        items.normalised("byte")


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    items = made(
        text=[f"été {i}\n" for i in range(40)], written_starts=np.minimum(np.arange(41), 30), written=range(30)
    )
    write_items(tmp_path, items, PROVENANCE)
    again, provenance = read_items(tmp_path)
    assert provenance == PROVENANCE
    for name in vars(items):
        np.testing.assert_array_equal(getattr(again, name), getattr(items, name), err_msg=name)
    (tmp_path / module.ITEMS).write_bytes(b"PAR1 and no more")
    with pytest.raises(EvidenceError, match="no evidence of a task"):
        read_items(tmp_path)


def test_a_part_keeps_its_ragged_columns() -> None:
    items = made(5, written_starts=[0, 2, 2, 5, 6, 9], written=range(9))
    part = items.take(np.array([3, 0, 2]))
    assert part.id.tolist() == ["q3", "q0", "q2"]
    np.testing.assert_array_equal(part.logprob, items.logprob.reshape(5, 3)[[3, 0, 2]].ravel())
    assert [part.wrote(i).tolist() for i in range(3)] == [[5], [0, 1], [2, 3, 4]]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"id": ["a"] * 40}, "stands 40 times"), ({"pred": np.full(40, 3)}, "pred is no choice"),
        ({"starts": np.zeros(41)}, "starts does not rise"), ({"score": np.full(40, np.nan)}, "40 values are NaN"),
    ],
)  # fmt: skip
def test_what_is_no_evidence_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(EvidenceError, match=match):
        made(**changes)


def test_only_the_same_questions_pair() -> None:
    items = made()
    items.require_paired(made(seed=1))
    with pytest.raises(EvidenceError, match=r"item 3, q3: prompt_hash differs:  and x"):
        items.require_paired(made(prompt_hash=["", "", "", "x"] + [""] * 36))
    with pytest.raises(EvidenceError, match="40 items beside 39"):
        items.require_paired(made(39))
    with pytest.raises(EvidenceError, match="task_digest differs"):
        PROVENANCE.require_comparable(replace(PROVENANCE, task_digest="other"))


def test_bias_scores_are_the_ratios_of_their_paper_and_their_errors_the_delta_methods() -> None:
    """BBQ: 2 · biased / (biased + counter) - 1; the standard error against a bootstrap of the ratio itself."""
    n = 400
    items = made(n, role=np.tile([BIASED, COUNTER, UNRELATED], n), group=["disambig"] * n)
    chosen = items.role.reshape(n, 3)[np.arange(n), items.pred]
    biased, counter = (chosen == BIASED), (chosen == COUNTER)
    values = measures.DISAMBIGUATED_BIAS.values(items)
    assert values.mean() == pytest.approx(2 * biased.sum() / (biased.sum() + counter.sum()) - 1)
    rng = np.random.default_rng(1)
    draws = rng.integers(0, n, (2000, n))
    ratios = 2 * biased[draws].sum(1) / (biased[draws].sum(1) + counter[draws].sum(1)) - 1
    assert st.paired_mean(values, items.cluster).se == pytest.approx(ratios.std(), rel=0.06)
    wrong = 1 - items.score.mean()
    assert measures.AMBIGUOUS_BIAS.values(items).mean() == pytest.approx(wrong * values.mean(), rel=1e-5)
    per_token = items.normalised("token").reshape(n, 3)
    by_role = np.stack([per_token[items.role.reshape(n, 3) == role] for role in (BIASED, COUNTER, UNRELATED)])
    stereotype = measures.STEREOTYPE.values(items)
    assert (stereotype == (by_role[0] > by_role[1])).all()  # StereoSet divides by tokens
    assert measures.LANGUAGE_MODEL.values(items).mean() == pytest.approx((by_role[:2] > by_role[2]).mean())
    meaningful = measures.LANGUAGE_MODEL.values(items).mean()
    share = stereotype.mean()
    assert measures.ICAT.values(items).mean() == pytest.approx(meaningful * min(share, 1 - share) / 0.5)


def scored(score: np.ndarray[Any, Any], **changes: Any) -> Items:
    """Items of two choices whose scores are given."""
    n = len(score)
    logprob = np.stack([np.where(score > 0, -1.0, -3.0), np.full(n, -2.0)], 1).ravel()
    return made(n, 2, logprob=logprob, pred=np.where(score > 0, 0, 1), score=score, **changes)


def test_findings_of_a_task_are_the_paired_statistics() -> None:
    rng = np.random.default_rng(3)
    before = (rng.random(200) < 0.6).astype(float)
    after = np.where(rng.random(200) < 0.2, 1 - before, before)
    found = task_findings.compare("t", measures.ACCURACY, scored(before), scored(after))
    assert found is not None
    lost, gained = int(np.sum(before > after)), int(np.sum(after > before))
    assert found.flips == (lost, gained, 0)
    assert (found.p, found.test) == (st.mcnemar(lost, gained), "exact McNemar")
    interval = st.paired_mean(after - before, np.arange(200)).scaled(100.0)
    assert (found.delta, found.low, found.high) == pytest.approx((interval.estimate, interval.low, interval.high))
    assert found.p_same == pytest.approx(st.tost(interval, 1.0))
    clusters = np.arange(200) // 4
    few = task_findings.compare(
        "t", measures.ACCURACY, scored(before, cluster=clusters), scored(after, cluster=clusters)
    )
    assert few is not None
    assert (few.clusters, few.p) == (50, st.paired_test(after - before, clusters).p)


def test_no_change_is_no_proof_and_many_items_without_one_are() -> None:
    same = np.ones(50)
    few = task_findings.compare("t", measures.ACCURACY, scored(same), scored(same))
    many = task_findings.compare("t", measures.ACCURACY, scored(np.ones(900)), scored(np.ones(900)))
    assert few is not None
    assert many is not None
    assert few.p_same == pytest.approx(0.99**50)
    assert few.high == pytest.approx(100 * st.clopper_pearson(0, 50).high)
    table = task_findings.adjust({"a": [few], "b": [many]})
    assert [table[name][0].verdict for name in "ab"] == ["unclear", "same"]
    worse = task_findings.compare("t", measures.ACCURACY, scored(same), scored(np.arange(50) % 2))
    assert worse is not None
    ((found,),) = task_findings.adjust({"a": [worse]}).values()
    assert (found.verdict, found.flips) == ("worse", (25, 0, 0))


def test_pairs_without_a_third_sentence_compare_whole_log_likelihoods() -> None:
    items = made(60, 2, role=np.tile([BIASED, COUNTER], 60))
    assert (measures.STEREOTYPE.values(items) == (items.choice("sum") == 0)).all()


def test_where_nothing_changed_what_one_item_could_change_counts() -> None:
    roles = np.tile([BIASED, COUNTER, UNRELATED], 60)
    items = made(60, role=roles, group=["disambig"] * 60)
    found = task_findings.compare("t", measures.DISAMBIGUATED_BIAS, items, items)
    assert found is not None
    known = np.isin(items.pred, (0, 1)).mean()
    span = 2 / known  # one item from a biased answer to a counter-biased one, of those that count
    assert found.high == pytest.approx(100 * span * st.clopper_pearson(0, 60).high)
    assert found.p_same == pytest.approx((1 - 0.01 / span) ** 60)
    nats = task_findings.compare("t", measures.TARGET_NLL, *[made(60, 1, pred=np.zeros(60))] * 2)
    assert nats is not None
    assert nats.p_same == 0  # not a share: equal log-likelihoods are no sample of rare changes


def test_the_adversarial_drop_joins_by_id() -> None:
    before, after = np.ones(40), np.arange(40) % 4 > 0
    drop = task_findings.drop((scored(before), scored(after)), (scored(before[:30]), scored(before[:30])))
    assert drop is not None
    assert (drop.n, drop.reference) == (30, 0.0)
    assert drop.delta == pytest.approx(100 * (1 - after[:30].mean()))
