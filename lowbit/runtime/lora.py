"""LoRA adapters of PEFT on low-bit linears (QLoRA, arXiv 2305.14314): codes stay as they are, adapters learn.

    model = lora.attach(lowbit.load(checkpoint), LoraConfig(r=8, target_modules="all-linear"))
    ...                                                  train it as any PEFT model
    model.save_pretrained(directory)                     the adapters alone
    model = lora.restore(lowbit.load(checkpoint), directory)

``attach`` is ``peft.get_peft_model`` with a configuration that knows :class:`QLinear`. Needs the package ``peft``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from lowbit.errors import FormatError, MissingExtra, ModelError
from lowbit.runtime.linear import QLinear

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

try:
    from peft.tuners.lora import Linear as _Linear
except ImportError as _error:
    raise MissingExtra("peft is not installed", fix="pip install peft") from _error


class LoraQLinear(_Linear):  # type: ignore[misc]
    """``QLinear(x) + scaling * B A x``; the product A, B is never merged into codes."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: raises FormatError."""
        raise FormatError(
            "an adapter cannot be merged into low-bit weights", where=", ".join(adapter_names or self.active_adapters),
            why="the sum would have to be rounded again, which undoes what was learned",
            fix="keep the adapter beside the checkpoint, or merge it into what lowbit export --to bf16 writes",
        )  # fmt: skip

    def unmerge(self) -> None:
        """Nothing to undo."""


def registered(config: LoraConfig) -> LoraConfig:
    """The configuration itself, which from now on knows what to do with a QLinear."""
    config._register_custom_module({QLinear: LoraQLinear})
    return config


def attach(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """A PEFT model whose adapters sit on low-bit linears; ``target_modules`` as PEFT has them, or ``all-linear``.

    Only adapters are trainable. Raises ModelError for a model without low-bit linears.
    """
    from peft import get_peft_model

    sites = [name for name, module in model.named_modules() if isinstance(module, QLinear)]
    if not sites:
        raise ModelError("has no low-bit linears", where=type(model).__name__, fix="peft.get_peft_model itself")
    if config.target_modules == "all-linear":
        config.target_modules = sites
    return get_peft_model(model, registered(config))


def restore(model: PreTrainedModel, path: str | Path, **options: Any) -> PeftModel:
    """A PEFT model with the adapters that its ``save_pretrained`` wrote; ``options`` are ``from_pretrained``'s."""
    from peft import LoraConfig, PeftModel

    config = registered(LoraConfig.from_pretrained(str(path)))
    return PeftModel.from_pretrained(model, str(path), config=config, **options)
