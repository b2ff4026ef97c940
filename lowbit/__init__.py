"""lowbit: find, make, prove and ship the best low-bit version of a large language model.

    import lowbit
    model = lowbit.quantize(hf_model, "gptq:int4-g64", text="calibration.txt", tokenizer=tokenizer)
    model = lowbit.load("OUT")

Importing it costs milliseconds; torch and transformers load with the first call. After ``import lowbit``,
``transformers.AutoModelForCausalLM.from_pretrained("OUT")`` reads native checkpoints too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowbit import _hook
from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from lowbit.runtime.facade import load, quantize

__version__ = "0.1.0"
__all__ = ["LowbitError", "__version__", "load", "quantize"]

_hook.install()


def __getattr__(name: str) -> Any:
    if name in ("load", "quantize"):
        from lowbit.runtime import facade

        return getattr(facade, name)
    raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
