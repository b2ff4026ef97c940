"""Which engines a checkpoint can reach: every layout that holds its codes exactly, and who loads that."""

from __future__ import annotations

from pathlib import Path

from lowbit.errors import ExportError
from lowbit.io.engines import Verdict, expected
from lowbit.io.export import planned
from lowbit.io.hubnames import HubNames
from lowbit.io.interchange import registry
from lowbit.io.opening import open_low_bit


def loadable(path: Path) -> dict[str, list[Verdict]]:
    """By layout, what engines will make of the files that ``lowbit export`` would write of a native checkpoint.

    Layouts that would have to round are left out; GGUF, whose blocks are chosen as they are written, is not asked.
    Reads the manifest and no weights: a layout that refuses single values (a zero point out of its range) is found
    when it is written.
    """
    model = open_low_bit(path)
    names, found = HubNames(model.source), {}
    for layout in registry.LOW_BIT:
        try:
            planned(model, names, registry.layout(layout))
        except ExportError:
            continue
        found[layout] = expected(model, layout)
    return found
