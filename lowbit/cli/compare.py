"""lowbit compare: low-bit versions beside their original, paired, with intervals and verdicts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import Dtype, Jobs, Json, Model, StoreFolder, Style, Text, emit, quiet, say

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
    no_floor: Annotated[
        bool, typer.Option("--no-floor", help="Do not run the reference on the tasks a second time.")
    ] = False,
    dtype: Dtype = "auto",
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
    from lowbit.cli.run import run_grids
    from lowbit.cli.tables import show_reports
    from lowbit.study import grid

    folder = store or digest.cache_folder() / "compare"
    names = [name.strip() for name in (tasks or TOKENS).split(",") if name.strip()]
    failed = 0
    if TOKENS in names:
        evaluation = {
            "text": text or "pydoc", "protocol": protocol, "windows": windows, "batch": batch, "dtype": dtype,
        }  # fmt: skip
        cells = grid.of_directories(model, candidates, evaluation, say)
        failed += run_grids(folder, "compare", {"model": model, "candidates": candidates, **evaluation}, [cells], jobs)
        show_reports(folder, "compare", [cells], "json" if as_json else output, report)
    if wanted := [name for name in names if name != TOKENS]:
        from lowbit.study.tasks import Settings

        settings = Settings(
            limit, shots, _numbers(lengths), task_batch, dtype, drop_long, allow_code, not no_floor, data
        )
        failed += _tasks(folder, model, candidates, wanted, data, settings, jobs, as_json, _judge(judge))
    if failed:
        raise typer.Exit(1)


def _tasks(
    folder: Path, model: str, candidates: list[str], names: list[str], data: Path | None, settings: Any, jobs: int,
    as_json: bool, judge: Any,
) -> int:  # fmt: skip
    """Run tasks and print their table; how many cells failed."""
    from lowbit.cli import task_table
    from lowbit.cli.run import run_grids
    from lowbit.evaluation import judge as judging
    from lowbit.evaluation.tasks import registry
    from lowbit.study import task_table as found_tasks
    from lowbit.study import tasks
    from lowbit.study.grid import short_names
    from lowbit.study.store import Store

    chosen = registry.choose(names, data, say)
    planned = tasks.of_directories(model, short_names(candidates, "compare"), chosen, settings, say)
    spec = {"model": model, "candidates": candidates, "tasks": names}
    failed = run_grids(folder, "compare-tasks", spec, [planned], jobs)
    with Store(folder) as held:
        found = found_tasks.table(held, planned)
        pairs = {v.label: found_tasks.duels(held, planned, v) for v in planned.versions} if judge else {}
    judged = {label: judging.judge(duels, judge.ask) for label, duels in pairs.items() if duels}
    if as_json:
        emit(found_tasks.to_json(found) | {"judged": {label: asdict(j) for label, j in judged.items()}})
    else:
        task_table.show(found)
        task_table.show_judged(judged)
    return failed


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


def _numbers(text: str | None) -> tuple[int, ...]:
    from lowbit.errors import RecipeError

    try:
        found = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise RecipeError(f"{text!r} is no list of lengths", where="--lengths", fix="512,1024,2048") from None
    if any(n < 1 for n in found):
        raise RecipeError(f"{text!r} holds a length below 1", where="--lengths", fix="512,1024,2048")
    return found
