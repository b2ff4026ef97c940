"""lowbit compare: low-bit versions beside their original, paired, with intervals and verdicts."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import Dtype, Jobs, Json, Model, StoreFolder, Style, Text, quiet, say

TOKENS = "kl"  # among the tasks: the comparison token by token as well


def compare(
    model: Model,
    candidates: Annotated[list[str], typer.Argument(metavar="OUT...", help="Checkpoints or model directories.")],
    text: Text = None,
    protocol: Annotated[str, typer.Option(help="windows-N, llamacpp-N or sliding-N-STRIDE.")] = "windows-512",
    windows: Annotated[int, typer.Option(min=2, help="Windows of the text that are scored.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 1,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="LIST",
            help="Instead of windows of a text: basic, emergent, trust, dialogue, long, names of tasks, JSONL files or "
            "folders of them, lm-eval:NAME; with kl among them, the text as well.",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="The folder below which the tasks' files lie.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=2, help="The first N records of each task.")] = None,
    shots: Annotated[int | None, typer.Option("--shots", min=0, help="At most so many examples in a prompt.")] = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", metavar="N,N", help="Tokens of generated long prompts.")
    ] = None,
    task_batch: Annotated[int, typer.Option("--task-batch", min=1, help="Questions at a time, at most.")] = 32,
    drop_long: Annotated[
        bool, typer.Option("--drop-long", help="Leave out questions that are longer than the model reads.")
    ] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run programs that the models write, each in a closed process.")
    ] = False,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge", metavar="URL,MODEL", help="Let a model behind an OpenAI-compatible address judge dialogues."
        ),
    ] = None,
    analyses: Annotated[
        str | None,
        typer.Option(
            "--analyses",
            metavar="NAME,NAME",
            help="What else is read off the same evidence: where, cascades; of tasks confidence, disagreement, "
            "long_context; of both proxy.",
        ),
    ] = None,
    no_floor: Annotated[
        bool, typer.Option("--no-floor", help="Do not run the reference on the tasks a second time.")
    ] = False,
    dtype: Dtype = "auto",
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Hold no more than this, Python included (2GiB): models are read and scored block by block.",
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Write an HTML report here.")] = None,
    output: Style = "auto",
    store: StoreFolder = None,
    jobs: Jobs = 1,
    as_json: Json = False,
) -> None:
    """Score candidates beside the original on the same tokens; evidence is kept, so that nothing is scored twice.

    With --tasks, on the same questions.
    """
    quiet()
    from lowbit import digest
    from lowbit.cli import tables, task_table
    from lowbit.cli.run import run_grids
    from lowbit.evaluation.tasks import registry
    from lowbit.study import analyse, grid
    from lowbit.study.tasks import Settings
    from lowbit.study.tasks import of_directories as of_tasks

    folder = store or digest.cache_folder() / "compare"
    names, asked = _names(tasks or TOKENS), _names(analyses or "")
    wanted, judging = [name for name in names if name != TOKENS], _judge(judge)
    chosen = registry.choose(wanted, data, say) if wanted else []
    of_tokens = TOKENS in names
    analyse.require(asked, tokens=of_tokens, candidates=len(candidates), tasks=[one.task for one in chosen])
    evaluation: dict[str, Any] = {
        "text": text or "pydoc", "protocol": protocol, "windows": windows, "batch": batch, "dtype": dtype,
    }  # fmt: skip
    if memory is not None:
        evaluation["memory"] = _memory(memory, wanted)
    cells = grid.of_directories(model, candidates, evaluation, say)
    if wanted:
        settings = Settings(
            limit, shots, _numbers(lengths), task_batch, dtype, drop_long, allow_code, not no_floor, data
        )
        cells = replace(cells, tasks=of_tasks(model, grid.short_names(candidates, "compare"), chosen, settings, say))
    spec = {"model": model, "candidates": candidates, "tasks": wanted, **evaluation}
    name = "compare" if of_tokens else "compare-tasks"
    failed = run_grids(folder, name, spec, [cells] if of_tokens or cells.tasks is None else [cells.tasks], jobs)
    judged = _judged(folder, cells.tasks, judging)
    more = {"judged": {label: asdict(j) for label, j in judged.items()}} if wanted else {}
    style: tables.Output = "json" if as_json else output
    if of_tokens:
        tables.show_reports(folder, name, [cells], style, report, asked, more=more)
    else:
        tables.show_answers(folder, name, cells, style, report, asked, more)
    if not as_json:
        task_table.show_judged(judged)
    if failed:
        raise typer.Exit(1)


def _judged(folder: Path, planned: Any, judge: Any) -> dict[str, Any]:
    """What the judge says of the dialogues of each candidate; nothing without a judge, or without tasks."""
    from lowbit.evaluation import judge as judging
    from lowbit.study.store import Store
    from lowbit.study.task_table import duels

    if judge is None or planned is None:
        return {}
    with Store(folder) as held:
        pairs = {version.label: duels(held, planned, version) for version in planned.versions}
    return {label: judging.judge(mine, judge.ask) for label, mine in pairs.items() if mine}


def _names(text: str) -> list[str]:
    """The names of a list, each once; none of none. Raises RecipeError for a list of nothing."""
    from lowbit.errors import RecipeError

    if text and not text.replace(",", "").strip():
        raise RecipeError(f"{text!r} names nothing", where="--tasks or --analyses", fix="names between commas")
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _judge(text: str | None) -> Any:
    """The endpoint that URL,MODEL names."""
    from lowbit.errors import RecipeError
    from lowbit.evaluation.judge import Judge

    if text is None:
        return None
    url, comma, name = text.rpartition(",")
    if not comma or not name:
        raise RecipeError(f"{text!r} names no model", where="--judge", fix="http://localhost:8000/v1,MODEL")
    return Judge(url, name)


def _memory(text: str, tasks: list[str]) -> int:
    """Bytes; of tokens alone."""
    from lowbit.errors import RecipeError
    from lowbit.pipeline.allocate import size

    if tasks:
        raise RecipeError(
            f"--memory goes with tokens alone, not with {', '.join(tasks)}", where="--memory",
            why="questions are answered by whole models", fix="one of the two",
        )  # fmt: skip
    return size(text)


def _numbers(text: str | None) -> tuple[int, ...]:
    from lowbit.errors import RecipeError

    try:
        found = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise RecipeError(f"{text!r} is no list of lengths", where="--lengths", fix="512,1024,2048") from None
    if any(n < 1 for n in found):
        raise RecipeError(f"{text!r} holds a length below 1", where="--lengths", fix="512,1024,2048")
    return found
