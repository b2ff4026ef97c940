"""Finding an answer in what a model wrote, and judging it."""

from __future__ import annotations

import re

from lowbit.evaluation.tasks.base import Grade, Value

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_MARKED = re.compile(r"####\s*(-?\$?[\d,]*\.?\d+)")
_CONCLUDED = re.compile(r"answer is:?\s*(.+?)(?:\.\s|\.?\n|\.?$)", re.IGNORECASE)


def number(value: Value, text: str) -> Grade:
    """The number behind "####", else behind "the answer is", else the last one; compared as numbers."""
    marked = _MARKED.search(text)
    concluded = _CONCLUDED.search(text)
    inside = _NUMBER.findall(concluded[1]) if concluded else []
    anywhere = _NUMBER.findall(text)
    found = marked[1] if marked else inside[0] if inside else anywhere[-1] if anywhere else None
    if found is None:
        return Grade(0.0, "", False)
    right = _plain(found) == _plain(value["answer"])
    return Grade(float(right), _plain(found), True)


def conclusion(value: Value, text: str) -> Grade:
    """What stands behind "the answer is", as BIG-Bench Hard's examples write it; without it no answer is found."""
    found = _CONCLUDED.findall(text)
    if not found:
        return Grade(0.0, "", False)
    answer = found[-1].strip().rstrip(".")
    return Grade(float(answer.casefold() == value["answer"].strip().casefold()), answer, True)


def formula(value: Value, text: str) -> Grade:
    r"""The last \boxed{...}, else what stands behind "answer is"; compared after spelling differences are removed."""
    found = boxed(text)
    if found is None and (concluded := _CONCLUDED.findall(text)):
        found = concluded[-1].strip().strip("$")
    if not found:
        return Grade(0.0, "", False)
    return Grade(float(spelled(found) == spelled(value["answer"])), found, True)


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, braces inside it balanced; None where there is none or it never closes."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + len(r"\boxed"), len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + len(r"\boxed{") : i]
    return None


def spelled(formula: str) -> str:
    """One spelling of a formula: no spaces, size marks, units of text, dollar or degree signs; fractions as \\frac."""
    text = re.sub(r"\\(left|right|!|,|;|:|quad|displaystyle)", "", formula)
    text = re.sub(r"\\[td]frac", r"\\frac", text)
    text = re.sub(r"\\(?:text|mbox|mathrm)\{[^{}]*\}$", "", text.strip())
    text = re.sub(r"\\(?:text|mbox|mathrm)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^\{?\\circ\}?|\\%|%|\\\$|\$|\s", "", text)
    text = re.sub(r"\\frac(\w)(\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return text.rstrip(".")


def contains(value: Value, text: str) -> Grade:
    """Whether the answer stands in the text, as retrieval tasks are judged."""
    found = value["answer"].casefold() in text.casefold()
    return Grade(float(found), value["answer"] if found else text.strip().partition("\n")[0], bool(text.strip()))


def first_line(value: Value, text: str) -> Grade:
    """The first line that is not empty, word for word."""
    answer = text.strip().partition("\n")[0].strip()
    return Grade(float(answer.casefold() == value["answer"].strip().casefold()), answer, bool(answer))


def _plain(text: str) -> str:
    """A number without signs of money and thousands, 18.00 as 18."""
    kept = text.replace(",", "").replace("$", "").strip().rstrip(".")
    if "." in kept:
        kept = kept.rstrip("0").rstrip(".")
    return kept
