"""From any low-bit files to any others: bit for bit, or refused, or rounded once more and told what that costs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lowbit.errors import ExportError
from lowbit.io.engines import expected, warnings
from lowbit.io.export import PROVENANCE, Exported, export, provenance
from lowbit.io.folder import require_free
from lowbit.io.importing import import_low_bit
from lowbit.io.opening import LowBit, open_native
from lowbit.io.rounding import Rounded
from lowbit.io.storage import NOTHING_LEFT, storage, write_json

NATIVE = "lowbit"


def convert(
    model: LowBit, to: str, out: Path, on_progress: Callable[[int, int], object] = lambda done, total: None,
    rounded: Rounded | None = None,
) -> Exported:  # fmt: skip
    """Write ``model`` as ``to``: a layout, ``gguf`` or ``gguf:TYPE`` (then ``out`` is a file), or ``lowbit``.

    Nothing is rounded unless the caller did (``rounded``, from :func:`lowbit.io.rounding.to_fit`, whose ledger is
    complete afterwards). Raises ExportError naming what the target cannot hold, and StorageError for ``out``.
    """
    written = model if rounded is None else rounded.rounded()
    name, colon, kind = to.partition(":")
    if name == "gguf":
        done = _gguf(written, kind or None, out)
    elif colon:
        raise ExportError(f"{name} has no types to choose from", where=to, fix=f"--to {name}")
    elif to == NATIVE:
        require_free(out)
        import_low_bit(written, out, on_progress)
        made = open_native(out)
        done = Exported(out, NATIVE, made.source.store.nbytes(), len(made.specs))
    else:
        done = export(written, to, out, on_progress=on_progress)
    return replace(done, warnings=warnings(expected(written, done.layout)))


def _gguf(model: LowBit, kind: str | None, out: Path) -> Exported:
    from lowbit.io.gguf.write import write

    if out.suffix != ".gguf":
        raise ExportError("is no name of a .gguf file", where=str(out), fix="-o FILE.gguf")
    note = out.with_name(f"{out.name}.{PROVENANCE}")
    for path in (out, note):
        if os.path.lexists(path):
            raise ExportError("exists", where=str(path), why="nothing is overwritten", fix="another -o FILE.gguf")
    with storage(out, NOTHING_LEFT):
        out.parent.mkdir(parents=True, exist_ok=True)
    notes = write(model, out, kind)
    layout = f"gguf:{kind}" if kind else "gguf"
    with storage(note, f"{out.name} is whole"):
        write_json(note, provenance(model, layout, tuple(notes), out.parent), shared=True)
    return Exported(out, layout, out.stat().st_size, len(model.specs), tuple(notes))
