"""Which tokens are scored, counted by hand, and that each is scored once."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import CalibrationError, RecipeError
from lowbit.evaluation.protocol import Windows, parse


def cut(spelling: str, tokens: int, limit: int | None = None) -> Windows:
    return parse(spelling).cut(torch.arange(tokens), limit, "a text", "its digest")


def targets(windows: Windows) -> list[list[int]]:
    """The scored tokens of each window; ids are their own positions in the text."""
    return [row[first:].tolist() for row, first in zip(windows.ids, windows.first.tolist(), strict=True)]


def test_windows_score_all_but_the_first_token_of_each() -> None:
    windows = cut("windows-4", 11)
    assert windows.ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]  # the partial third is left out
    assert targets(windows) == [[1, 2, 3], [5, 6, 7]]
    assert windows.scored == 6


def test_llamacpp_scores_the_second_half_only() -> None:
    """llama.cpp's perplexity: n_ctx - n_ctx / 2 - 1 tokens a window, from position n_ctx / 2 + 1."""
    windows = cut("llamacpp-8", 17)
    assert targets(windows) == [[5, 6, 7], [13, 14, 15]]
    assert cut("llamacpp-512", 1024).scored == 2 * 255


def test_sliding_scores_every_token_once_with_the_most_context() -> None:
    windows = cut("sliding-6-2", 11)
    assert windows.ids[:, 0].tolist() == [0, 2, 4]
    assert targets(windows) == [[1, 2, 3, 4, 5], [6, 7], [8, 9]]


def test_sliding_by_the_whole_window_is_windows() -> None:
    """No token is scored without context."""
    a, b = cut("sliding-4-4", 12), cut("windows-4", 12)
    assert targets(a) == targets(b)
    assert a.digest == b.digest


@pytest.mark.parametrize("spelling", ["windows-1024", "llamacpp-512", "sliding-1024-512"])
@pytest.mark.parametrize("chunk", [None, 1, 64])
def test_a_protocol_has_one_spelling(spelling: str, chunk: int | None) -> None:
    """Windows are cut alike, however they are run."""
    whole = spelling if chunk is None else f"{spelling}/chunk-{chunk}"
    assert str(parse(whole)) == whole
    assert parse(whole).chunk == chunk
    assert cut(whole, 2048).protocol == spelling
    assert cut(whole, 2048).digest == cut(spelling, 2048).digest


@pytest.mark.parametrize(
    "spelling",
    ["", "windows", "windows-3", "windows-", "llamacpp-0", "sliding-8", "sliding-8-9", "sliding-8-0", "x-8",
     "windows-8/chunk-0", "windows-8/chunk", "windows-8/chunk-2/chunk-2", "chunk-8"],
)  # fmt: skip
def test_what_is_no_protocol_is_refused(spelling: str) -> None:
    with pytest.raises(RecipeError, match="windows-1024"):
        parse(spelling)


def test_a_limit_takes_the_first_windows_and_must_be_met() -> None:
    assert torch.equal(cut("windows-4", 40, 3).ids, cut("windows-4", 12).ids)
    with pytest.raises(CalibrationError, match=r"40 tokens give 10 windows of windows-4, 11 are asked for[\s\S]*10"):
        cut("windows-4", 40, 11)
    with pytest.raises(CalibrationError, match="0 windows"):
        cut("windows-4", 3)


def test_the_digest_is_of_tokens_and_of_which_are_scored() -> None:
    one = cut("windows-8", 16)
    assert one.digest == parse("windows-8").cut(torch.arange(16), None, "another name", "same tokens").digest
    assert one.digest != cut("llamacpp-8", 16).digest
    assert one.digest != cut("windows-8", 24).digest
    assert one.digest != parse("windows-8").cut(torch.arange(1, 17), None, "a text", "its digest").digest
