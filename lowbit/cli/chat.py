"""lowbit chat: a conversation in the terminal, or line by line through a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli.opened import KV, Kernels, MemoryLimit, opened
from lowbit.cli.options import Dtype, Seed, quiet, say

if TYPE_CHECKING:
    from lowbit.runtime.conversation import Answer, Conversation

_HELP = """/system TEXT  the system's message; without TEXT it is taken away
/reset        begin anew, with the system's message kept
/save FILE    write the conversation as JSON
/exit         leave (so does Ctrl-D); Ctrl-C ends an answer
//TEXT        a message that begins with a slash"""
_PLAIN = "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"  # not printable, and harmless
_COMMANDS = ("/system", "/reset", "/save", "/exit", "/help")


def chat(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A native checkpoint, or any model tuned to chat.")],
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="What the model is told first.")] = "",
    tokens: Annotated[int, typer.Option("-n", "--max-new-tokens", min=1, help="An answer, at most.")] = 512,
    context: Annotated[
        int | None, typer.Option("--context", min=16, help="Tokens of the conversation; default: up to 4096.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw from this much of the mass.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Draw from so many tokens; 0 from all.")] = 0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    kernels: Kernels = "auto",
    kv: KV = None,
    memory: MemoryLimit = None,
) -> None:
    """Talk with a model. Answers go to standard output, everything else to standard error.

    /help lists what can be typed. Through a pipe every line is a message, and every answer is printed as it comes.
    """
    quiet()
    from lowbit.runtime.conversation import Conversation
    from lowbit.runtime.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    held = opened(model, dtype, kernels, kv, memory, context or 4096)
    longest = context or 4096 if held.longest is None else min(context or 4096, held.longest)
    talk = Conversation(held.model, held.tokenizer, kv=held.kv, sampling=sampling, context=longest)
    talk.system(system)
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # makes input() edit lines and remember them
        say(f"{model}: up to {longest} tokens; /help lists what can be typed")
    for line in _lines():
        if line == "/exit":
            break
        _take(talk, line, min(tokens, longest // 2))


def _lines() -> Iterator[str]:
    """What the user types, or what comes through the pipe, without blank lines."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            if prompt:
                say("")
            return
        except KeyboardInterrupt:  # at the prompt it clears the line
            say("\n/exit or Ctrl-D to leave")
            continue
        if line:
            yield line


def _take(talk: Conversation, line: str, tokens: int) -> None:
    """One line: a command or a message. An error ends a pipe, which has nobody to read it and go on."""
    from lowbit.errors import LowbitError

    try:
        if line.startswith("/") and not line.startswith("//"):
            _command(talk, line)
        else:
            _ask(talk, line.removeprefix("/") if line.startswith("//") else line, tokens)
    except LowbitError as error:
        if not sys.stdin.isatty():
            raise
        say(f"lowbit: {error}")


def _ask(talk: Conversation, text: str, tokens: int) -> None:
    with _interruptible() as stopped:
        answer = talk.ask(text, tokens, _print, stopped)
    print(flush=True)
    say(_about(talk, answer))


def _about(talk: Conversation, answer: Answer) -> str:
    import psutil

    from lowbit.report.text import size

    rate = "" if answer.tokens_per_second is None else f", {answer.tokens_per_second:.1f} tokens/s"
    end = {"stop": "", "length": "; cut at the limit (-n)", "interrupted": "; interrupted"}[answer.finish]
    return (
        f"[{answer.tokens} tokens{rate}, first after {answer.first_s:.2f} s, {answer.read} read; "
        f"{size(psutil.Process().memory_info().rss)} of memory, {size(talk.nbytes)} of it keys and values{end}]"
    )


def _print(text: str) -> None:
    """A piece of an answer; what would move the cursor or change the terminal is shown as its escape."""
    from lowbit.report.text import safe

    print("".join(c if c in _PLAIN else safe(c) for c in text), end="", flush=True)


def _command(talk: Conversation, line: str) -> None:
    from lowbit.errors import RecipeError, nearest

    name, _, rest = line.partition(" ")
    rest = rest.strip()
    match name:
        case "/help":
            say(_HELP)
        case "/system":
            talk.system(rest)
        case "/reset":
            said = [m["content"] for m in talk.messages if m["role"] == "system"]
            talk.reset()
            talk.system("".join(said))
        case "/save":
            _save(talk, rest)
        case _:
            raise RecipeError(
                f"unknown command {name!r}", where="chat", fix=f"{nearest(name, _COMMANDS)} (// begins text)"
            )


def _save(talk: Conversation, name: str) -> None:
    from lowbit.errors import RecipeError, StorageError
    from lowbit.io.storage import storage, write_json

    if not name:
        raise RecipeError("/save wants a file's name", where="chat", fix="/save talk.json")
    path = Path(name).expanduser()
    if path.exists():
        raise StorageError("exists", where=name, why="nothing is overwritten", fix="another name")
    with storage(path, "the conversation goes on"):
        write_json(path, {"messages": talk.messages})
    say(f"{len(talk.messages)} messages in {path}")


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks to stop, and the answer ends at a whole token; a second one does not wait for it."""
    asked = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
