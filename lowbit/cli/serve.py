"""lowbit serve: a model, or two side by side, behind OpenAI's API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lowbit.cli.options import Device, Dtype, quiet, say

if TYPE_CHECKING:
    from lowbit.formats.heads import CacheFormat
    from lowbit.serve.served import Served


def serve(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A native checkpoint, or any model.")],
    beside: Annotated[
        str | None, typer.Option("--beside", metavar="MODEL", help="A second model, such as the original.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; others than this machine need 0.0.0.0.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="What requests call the model; once more for the second.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=1024, help="Sequences that run at a time.")] = 8,
    queue: Annotated[int, typer.Option(min=1, help="Sequences that wait; beyond them 429.")] = 256,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of a prompt that are read between two tokens.")] = 128,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens a sequence; default: as the model says.")] = None,
    kv: Annotated[
        str | None,
        typer.Option("--kv", metavar="FORMAT", help="Keys and values in few bits (int4-head); default: as OUT says."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds from a request to its last token.")] = 600.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that running requests get at the end.")] = 10.0,
    body: Annotated[str, typer.Option("--max-body", metavar="SIZE", help="Of a request.")] = "4MiB",
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with the API key; or set LOWBIT_API_KEY.", metavar="FILE")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    kernels: Annotated[
        Literal["auto", "reference", "dense"],
        typer.Option("--kernels", help="dense decodes all weights once: faster, with the memory of the original."),
    ] = "auto",
) -> None:
    """Serve a model over HTTP until SIGTERM or Ctrl-C; the page at / compares two."""
    quiet()
    _require()
    from lowbit.formats.heads import CacheFormat
    from lowbit.pipeline.allocate import size
    from lowbit.serve.app import create_app
    from lowbit.serve.limits import Limits
    from lowbit.serve.run import Server, bound, is_loopback

    limits = Limits(size(body), timeout, grace=grace, key=_key(api_key_file))
    rounding = None if kv is None else CacheFormat.parse(kv)
    names = _names([model] if beside is None else [model, beside], name or [])
    listening, models = bound(host, port), []
    for called, given in names.items():
        served = load(given, called, rounding, dtype, device, kernels, slots, queue, chunk, context)
        say(f"{served.name}: {served.weights_bytes / 1e6:.0f} MB of weights, digest {served.digest[:12]}")
        models.append(served)
    if not is_loopback(host) and limits.key is None:
        say(f"warning: anybody who reaches {host} can use this server; set LOWBIT_API_KEY")
    server = Server(
        create_app(models, limits), listening, lambda url: say(f"serving at {url} (chat page) and {url}/v1"), host
    )
    server.listen()


def load(
    given: str, name: str, kv: CacheFormat | None, dtype: str, device: str, kernels: str, slots: int,
    queue: int, chunk: int, context: int | None,
) -> Served:  # fmt: skip
    """Load a model and start its engine. ``kv`` None: as the checkpoint says. Raises ModelError and CheckpointError."""
    from transformers import AutoTokenizer

    from lowbit.errors import ModelError
    from lowbit.io import native
    from lowbit.models.resolve import locate
    from lowbit.runtime import decoding, facade
    from lowbit.serve.served import Served
    from lowbit.study.stages import dense_model, describe, torch_dtype

    path = locate(given, say)
    about = describe(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer cannot be read: {error}", where=str(path)) from error
    kind = facade.compute_dtype(device) if dtype == "auto" else torch_dtype(dtype)
    if native.is_native(path):
        model = facade.load(path, dtype=kind, device=device, kernels=kernels)
    else:
        model = dense_model(path, str(kind).removeprefix("torch.")).to(device)  # type: ignore[arg-type]  # transformers wraps the method, and its types
    if kernels == "auto":
        decoding.prepare(model)
    return Served.of(
        name, about["digest"], model, tokenizer,
        kv=kv or facade.cache_format(model), slots=slots, queue=queue, chunk=chunk, context=context,
        bits=about["bits_per_weight"],
    )  # fmt: skip


def _names(models: list[str], asked: list[str]) -> dict[str, str]:
    """What each model is called: as asked, else by its directory. Raises RecipeError for two of one name."""
    from lowbit.errors import RecipeError

    own = [Path(given).resolve().name if Path(given).exists() else Path(given).name for given in models]
    names = [*asked[: len(own)], *own[len(asked) :]]
    if len(set(names)) < len(names):
        raise RecipeError(
            f"two models named {names[0]!r}", why="a request names the model that it wants",
            fix="--name a --name b",
        )  # fmt: skip
    return dict(zip(names, models, strict=True))


def _key(file: Path | None) -> str | None:
    """The API key; never from the command line, which other users of the machine can read."""
    from lowbit.errors import StorageError

    if file is None:
        return os.environ.get("LOWBIT_API_KEY") or None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"the API key cannot be read: {error}", where=str(file)) from error


def _require() -> None:
    import importlib.util

    from lowbit.errors import MissingExtra

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra.of(package, "serve")
