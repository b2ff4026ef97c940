"""Registers lowbit's quantizer with transformers the moment transformers loads its own, and not before.

transformers has no discovery of quantizers by entry points; importing it here would cost every ``import lowbit``
seconds. So an import finder waits for one module and runs the registration after it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

_AWAITED = "transformers.modeling_utils"
_REGISTERS = "lowbit.runtime.transformers_quantizer"


def install() -> None:
    """Register now if transformers is loaded already, else when it is."""
    if _AWAITED in sys.modules:
        importlib.import_module(_REGISTERS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the awaited module like everyone else; its loader registers when it has run."""

    asking = False

    def find_spec(
        self, fullname: str, path: object, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AWAITED or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            loader, run = spec.loader, spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                importlib.import_module(_REGISTERS)

            loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
