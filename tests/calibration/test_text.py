"""Text and its tokens: roles that share nothing, identity by bytes, seeds, and what is too short or no text."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from lowbit import digest
from lowbit.calibration.text import DEFAULT, Text, encode, read, sample
from lowbit.errors import CalibrationError


def test_the_default_roles_share_no_topic_and_miss_none() -> None:
    calibration, evaluation = read(DEFAULT, "calibration"), read(DEFAULT, "evaluation")
    in_first = {name for name, body in topics.items() if body in calibration.content}
    in_second = {name for name, body in topics.items() if body in evaluation.content}
    assert in_first | in_second == set(topics)
    assert not in_first & in_second
    assert (calibration.name, evaluation.name) == ("pydoc:calibration", "pydoc:evaluation")
    assert min(len(calibration.content), len(evaluation.content)) > 0.45 * sum(map(len, topics.values()))


def test_long_passages_are_not_shared() -> None:
    """No paragraph and no run of four lines of one role stands in the other."""

    def runs(text: Text) -> set[str]:
        lines = [line for line in text.content.splitlines() if line.strip()]
        paragraphs = {" ".join(p.split()) for p in text.content.split("\n\n")}
        return {"\n".join(lines[i : i + 4]) for i in range(len(lines) - 4)} | {p for p in paragraphs if len(p) > 80}

    assert not runs(read(DEFAULT, "calibration")) & runs(read(DEFAULT, "evaluation"))


def test_identity_is_that_of_bytes(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("naïve text " * 50, encoding="utf-8")
    (tmp_path / "b.txt").write_text("naïve text " * 50, encoding="utf-8")
    (tmp_path / "c.txt").write_text("naive text " * 50, encoding="utf-8")
    a, b, c = (read(str(tmp_path / f"{name}.txt"), "calibration") for name in "abc")
    assert a.digest == b.digest == digest.of_file(tmp_path / "a.txt")
    assert a.digest != c.digest
    first, second = (sample(text, tokenizer, 4, 16, 0) for text in (a, b))
    assert first.digest == second.digest
    assert (first.text, first.text_digest, first.seed) == ("a.txt", a.digest, 0)
    assert first.digest != sample(a, tokenizer, 4, 16, 1).digest
    assert first.digest != sample(a, tokenizer, 3, 16, 0).digest


def test_windows_are_cut_without_overlap_and_drawn_by_seed(tokenizer: Any) -> None:
    text = Text("count", " ".join(str(i) for i in range(1000)))
    ids = encode(text, tokenizer)
    assert tokenizer.decode(ids) == text.content
    assert 0 not in ids  # no special token is added
    first = sample(text, tokenizer, 5, 32, None)
    assert torch.equal(first.ids, ids[: 5 * 32].view(5, 32))
    drawn = sample(text, tokenizer, 5, 32, 7)
    assert torch.equal(drawn.ids, sample(text, tokenizer, 5, 32, 7).ids)
    assert not torch.equal(drawn.ids, sample(text, tokenizer, 5, 32, 8).ids)
    windows = [tuple(w) for w in ids[: ids.numel() // 32 * 32].view(-1, 32).tolist()]
    places = [windows.index(tuple(w)) for w in drawn.ids.tolist()]
    assert places == sorted(set(places))  # no window twice


def test_text_that_is_too_short_says_by_how_much(tokenizer: Any) -> None:
    text = Text("short.txt", "x" * 100)
    assert sample(text, tokenizer, 3, 32, 0).ids.shape == (3, 32)
    with pytest.raises(CalibrationError, match=r"short\.txt: has 100 tokens, 4 windows of 32 need 128"):
        sample(text, tokenizer, 4, 32, 0)
    with pytest.raises(CalibrationError, match="has 0 tokens"):
        sample(Text("empty", ""), tokenizer, 1, 8, 0)


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    with pytest.raises(CalibrationError, match=r"latin\.txt: is not UTF-8"):
        read(str(tmp_path / "latin.txt"), "calibration")
    with pytest.raises(CalibrationError, match=r"nowhere\.txt: is no readable text file: No such file"):
        read(str(tmp_path / "nowhere.txt"), "calibration")
    with pytest.raises(CalibrationError, match="Is a directory"):
        read(str(tmp_path), "calibration")
