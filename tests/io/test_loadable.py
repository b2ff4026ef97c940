"""What is said to fit a layout is what export writes, and what is not is what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from whole_runs import quantize

from lowbit.errors import ExportError
from lowbit.io.export import export
from lowbit.io.interchange import registry
from lowbit.io.loadable import loadable
from lowbit.io.opening import open_low_bit


@pytest.mark.parametrize("recipe", ["rtn:int4-g32-sym", "rtn:int8-row-sym"])
def test_layouts_are_those_that_export_writes(llama: Path, recipe: str, tmp_path: Path) -> None:
    root = tmp_path / "q"
    quantize(llama, root, None, recipe)
    said = loadable(root)
    assert said, recipe
    for layout in registry.LOW_BIT:
        if layout in said:
            export(open_low_bit(root), layout, tmp_path / layout)
            assert "transformers" in {v.engine for v in said[layout]}
        else:
            with pytest.raises(ExportError):
                export(open_low_bit(root), layout, tmp_path / layout)
