"""lowbit catalog: a record of artefacts, their scores and where they come from, on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.options import Json, emit, quiet, say

if TYPE_CHECKING:
    from lowbit.study.catalog import Artefact, Catalog, Score

app = typer.Typer(
    help="What was made from what, with its bytes and scores: a record on this machine.", no_args_is_help=True
)
File = Annotated[
    Path | None,
    typer.Option("--catalog", metavar="FILE", help="Another record than the one in $LOWBIT_CACHE (~/.cache/lowbit)."),
]
Id = Annotated[str, typer.Argument(metavar="ID", help="A name, or the first digits of a digest.")]
_HEADS = ("name", "digest", "kind", "recipe", "bytes", "bits/weight", "made from", "scores", "added")
_WORDS = ("name", "digest", "kind", "recipe", "made from", "added", "field", "metric", "what")


@app.command()
def add(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A model, a checkpoint, an export, or a .gguf file.")],
    scores: Annotated[
        list[Path] | None, typer.Option("--scores", metavar="JSON", help="Output of lowbit compare --json.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="MODEL", help="What it was made from; checked.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="For people; default: the directory's.")] = None,
    catalog: File = None,
    as_json: Json = False,
) -> None:
    """Record an artefact, after reading every byte of it. The same bytes are recorded once."""
    quiet()
    from lowbit.study.artefact import artefact
    from lowbit.study.catalog import Catalog

    held = Catalog(catalog)
    reports = [_reports(path) for path in scores or ()]
    record = artefact(model, base, name)
    found = [_score(each, path, record.digest) for each, path in zip(reports, scores or (), strict=True)]
    new = held.add(record, found)
    if as_json:
        emit({"new": new, **_object(held, record)})
        return
    print(f"{'recorded' if new else 'was there'}: {_line(record)}")
    if record.parents and record.parents[0] not in held.artefacts:
        say(f"what it was made from is not recorded: {record.parents[0][:12]} (lowbit catalog add MODEL; --base MODEL)")


@app.command("list")
def list_(catalog: File = None, as_json: Json = False) -> None:
    """Print every artefact, in the order in which they were first recorded."""
    from lowbit.cli.columns import print_columns
    from lowbit.study.catalog import Catalog

    held = Catalog(catalog)
    if as_json:
        emit([_object(held, a) for a in held.artefacts.values()])
    elif held.artefacts:
        print_columns(_HEADS, [_row(held, a) for a in held.artefacts.values()], _WORDS)
    else:
        say(f"nothing is recorded in {held.path}: lowbit catalog add DIR")


@app.command()
def show(artefact: Id, catalog: File = None, as_json: Json = False) -> None:
    """Print all that is known of one artefact."""
    from lowbit.cli.columns import print_columns
    from lowbit.report.text import safe
    from lowbit.study.catalog import Catalog

    held = Catalog(catalog)
    found = held.find(artefact)
    if as_json:
        emit(_object(held, found))
        return
    values = asdict(found) | {"parents": ", ".join(_named(held, p) for p in found.parents) or "none: an original"}
    values |= {"files": f"{len(found.files)}", "nbytes": f"{found.nbytes:,}", "calibration": found.calibration or "–"}
    width = max(map(len, values))
    for key, value in values.items():
        print(f"{key.replace('_', ' '):<{width}}  {safe(str(value))}")
    for score in held.scores.get(found.digest, []):
        print(f"\n{_said(held, score)}")
        rows = [[metric, _spelled(f), str(f.get("n", "")), str(f.get("verdict", ""))] for metric, f in score.findings]
        print_columns(("metric", "value [interval]", "n", "verdict"), rows, ("metric", "value [interval]", "verdict"))


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A")],
    b: Annotated[str, typer.Argument(metavar="B")],
    catalog: File = None,
    as_json: Json = False,
) -> None:
    """Put two artefacts side by side. Scores of different texts, windows or originals are refused."""
    from lowbit.cli.columns import print_columns
    from lowbit.report.text import size
    from lowbit.study.catalog import Catalog

    held = Catalog(catalog)
    found = held.compare(held.find(a), held.find(b))
    if as_json:
        scores = found.scores and [asdict(score) for score in found.scores]
        emit({"a": asdict(found.a), "b": asdict(found.b), "scores": scores})
        return
    pair = (found.a, found.b)
    rows = [["recipe", *(x.recipe for x in pair)], ["bytes", *(size(x.nbytes) for x in pair)],
            ["bits/weight", *(f"{x.bits_per_weight:.2f}" for x in pair)]]  # fmt: skip
    if found.scores is not None:
        first, second = (dict(score.findings) for score in found.scores)
        rows += [[metric, _spelled(first[metric]), _spelled(second[metric])] for metric in first if metric in second]
    print_columns(("what", *(f"{x.name} ({x.digest[:12]})" for x in pair)), rows, ("what",))
    if found.scores is None:
        none = ", ".join(x.name for x in pair if x.digest not in held.scores)
        print(f"\nNo scores of {none}: lowbit compare ORIGINAL A B --json, then lowbit catalog add --scores.")
    else:
        print(f"\n{_said(held, found.scores[0])}. Each beside that original; whether A differs from B is a paired test:"
              " lowbit compare A B.")  # fmt: skip


@app.command()
def lineage(artefact: Id, catalog: File = None, as_json: Json = False) -> None:
    """Print what an artefact was made from, back to the original, and all that was made from that."""
    from lowbit.study.catalog import Catalog

    held = Catalog(catalog)
    found = held.find(artefact)
    line = held.ancestors(found)
    root = line[-1] if line else found.digest
    if as_json:
        below = [a.digest for a in _below(held, found.digest, set())]
        emit({"digest": found.digest, "ancestors": line, "descendants": below})
        return
    print(_named(held, root) if root not in held.artefacts else _line(held.artefacts[root]))
    _branch(held, root, "", {root}, found.digest)


def _branch(held: Catalog, key: str, indent: str, seen: set[str], marked: str) -> None:
    children = [a for a in held.children(key) if a.digest not in seen]
    for i, child in enumerate(children):
        seen.add(child.digest)
        last = i == len(children) - 1
        print(f"{indent}{'└─' if last else '├─'} {_line(child)}{'  <' if child.digest == marked else ''}")
        _branch(held, child.digest, indent + ("   " if last else "│  "), seen, marked)


def _below(held: Catalog, key: str, seen: set[str]) -> list[Artefact]:
    found = []
    for child in held.children(key):
        if child.digest not in seen:
            seen.add(child.digest)
            found += [child, *_below(held, child.digest, seen)]
    return found


def _reports(path: Path) -> list[Any]:
    import json

    from lowbit.errors import StudyError

    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except ValueError as error:
        raise StudyError(f"is no JSON: {error}", where=str(path), fix="lowbit compare ... --json > FILE") from error
    return value if isinstance(value, list) else [value]


def _score(reports: list[Any], path: Path, key: str) -> Score:
    """The score of an artefact in one file, which may hold reports of several models."""
    from lowbit.errors import StudyError
    from lowbit.study.catalog import scores_of

    trouble: StudyError | None = None
    for report in reports:
        try:
            return scores_of(report, key)
        except StudyError as error:
            trouble = error
    raise trouble or StudyError("holds no report", where=str(path), fix="lowbit compare ... --json > FILE")


def _object(held: Catalog, artefact: Artefact) -> dict[str, Any]:
    return {**asdict(artefact), "scores": [asdict(score) for score in held.scores.get(artefact.digest, [])]}


def _row(held: Catalog, a: Artefact) -> list[str]:
    from lowbit.report.text import size

    parent = _named(held, a.parents[0]) if a.parents else "–"
    scores = str(len(held.scores.get(a.digest, [])))
    return [a.name, a.digest[:12], a.kind, a.recipe, size(a.nbytes), f"{a.bits_per_weight:.2f}", parent, scores,
            a.added[:10]]  # fmt: skip


def _line(a: Artefact) -> str:
    from lowbit.report.text import safe, size

    made = a.kind if a.recipe in ("", "dense") else f"{a.kind}, {a.recipe}"
    return safe(f"{a.name} ({a.digest[:12]}): {made}, {size(a.nbytes)}, {a.bits_per_weight:.2f} bits a weight")


def _named(held: Catalog, key: str) -> str:
    return held.artefacts[key].name if key in held.artefacts else f"{key[:12]} (not recorded)"


def _said(held: Catalog, score: Score) -> str:
    p = dict(score.protocol)
    return (
        f"Beside {_named(held, score.reference)}: {p['text']}, {p['windows']} windows of {p['length']},"
        f" {p['tokens']} tokens, {p['dtype']}, text {str(p['digest'])[:12]}"
    )


def _spelled(finding: Mapping[str, Any]) -> str:
    return f"{finding['value']:.4g} [{finding['low']:.4g}, {finding['high']:.4g}] {finding.get('unit', '')}".rstrip()
