"""The commands, gathered."""

from __future__ import annotations

import typer

import lowbit
from lowbit.cli import (
    advise,
    card,
    catalog,
    chat,
    check,
    compare,
    compress,
    convert,
    doctor,
    export,
    generate,
    import_,
    inspect,
    plan,
    quantize,
    report,
    sensitivity,
    serve,
    study,
)

app = typer.Typer(
    name="lowbit",
    help="Find, make, prove and ship the best low-bit version of a large language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> bool:
    if show:
        print(f"lowbit {lowbit.__version__}")
        raise typer.Exit
    return show


@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    pass


app.command("inspect")(inspect.inspect)
app.command("plan")(plan.plan)
app.command("quantize")(quantize.quantize)
app.command("card")(card.card)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("advise")(advise.advise)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("compress")(compress.compress)
app.command("decompress")(compress.decompress)
app.command("export")(export.export)
app.command("import")(import_.import_)
app.command("convert")(convert.convert)
app.command("check")(check.check)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.add_typer(study.app, name="study")
app.add_typer(catalog.app, name="catalog")
