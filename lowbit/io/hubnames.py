"""How files name what a model holds: transformers' own renamings, undone, and experts one by one.

A model in memory may have other names than its files: experts that the model fuses into one parameter are separate
linears in files, gate and up apart. transformers knows the names of each family; it is asked, not copied.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lowbit.arrays import Tensor
from lowbit.errors import ExportError
from lowbit.formats.blocks import ALL
from lowbit.models.graph import is_linear
from lowbit.models.source import Source

_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<leaf>gate_up_proj|down_proj)")


class Part(NamedTuple):
    """A linear of a file, and which rows of the model's linear it is."""

    site: str
    rows: slice


class HubNames:
    """The names in files of a model's linears and tensors."""

    def __init__(self, source: Source) -> None:
        self._model: PreTrainedModel = source.skeleton
        self._experts: dict[str, dict[tuple[str, int], list[str]]] = {}

    def parts(self, site: str) -> list[Part]:
        """A linear of the model as linears of files, in the order of its rows.

        Raises ExportError where files hold it only together with others.
        """
        if match := _EXPERT.fullmatch(site):
            names = self._named_experts(match["experts"]).get((match["leaf"], int(match["index"])))
            if names is None:
                raise ExportError(
                    "experts are one tensor in files of this family", where=site,
                    why="no layout of low-bit linears holds that", fix="--to bf16",
                )  # fmt: skip
            if len(names) == 1:
                return [Part(names[0], ALL)]
            half = self._model.get_submodule(site).weight.shape[0] // 2  # type: ignore[index, union-attr, operator]
            return [Part(names[0], slice(0, half)), Part(names[1], slice(half, None))]
        if site not in self._renamed:
            raise ExportError("is no linear of its own in files of this family", where=site, fix="--to bf16")
        return [Part(self._renamed[site], ALL)]

    def tensors(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Some of a model's tensors as files hold them: experts cut apart, all under the names of files."""
        found: dict[str, Tensor] = {}
        rest: dict[str, Tensor] = {}
        fused: dict[str, dict[int, Tensor]] = {}
        for name, tensor in held.items():
            match = _EXPERT.fullmatch(name.removesuffix(".weight"))
            if match is None:
                rest[name] = tensor
            elif self._named_experts(match["experts"]):
                for part in self.parts(match[0]):
                    found[f"{part.site}.weight"] = tensor[part.rows]
            else:
                fused.setdefault(f"{match['experts']}.{match['leaf']}", {})[int(match["index"])] = tensor
        rest |= {name: torch.stack([by_index[i] for i in sorted(by_index)]) for name, by_index in fused.items()}
        return found | self._reverted(rest)

    @functools.cached_property
    def _renamed(self) -> dict[str, str]:
        """Linears but experts by their names in files, where each is one there too; numbers sent through tell."""
        sites = [n for n, m in self._model.named_modules() if is_linear(m) and not _EXPERT.fullmatch(n)]
        numbered = {f"{site}.weight": torch.full((1, 1), float(i)) for i, site in enumerate(sites)}
        named = self._reverted(numbered).items()
        whole = {name: value for name, value in named if value.shape == (1, 1) and name.endswith(".weight")}
        return {sites[int(value)]: name.removesuffix(".weight") for name, value in whole.items()}

    def _reverted(self, held: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = revert_weight_conversion(self._model, held)  # type: ignore[no-untyped-call, unused-ignore]
        return found

    def _named_experts(self, experts: str) -> dict[tuple[str, int], list[str]]:
        """By leaf and index: the names in files, gate before up; nothing where files hold all experts as one tensor.

        Found by sending numbered rows through.
        """
        if experts not in self._experts:
            count = len(self._model.get_submodule(experts))  # type: ignore[arg-type]
            probe = {
                f"{experts}.gate_up_proj": torch.arange(2.0 * count).view(count, 2, 1),
                f"{experts}.down_proj": torch.arange(1.0 * count).view(count, 1, 1),
            }
            found: dict[tuple[str, int], list[str]] = {}
            for fused, rows in probe.items():
                leaf = fused.rpartition(".")[2]
                named = self._reverted({fused: rows})
                if len(named) == 1 and next(iter(named.values())).ndim == rows.ndim:
                    found = {}
                    break
                by_row = {float(value): name.removesuffix(".weight") for name, value in named.items()}
                each = 2 if leaf == "gate_up_proj" else 1
                for e in range(count):
                    found[leaf, e] = [by_row[float(each * e + i)] for i in range(each)]
            self._experts[experts] = found
        return self._experts[experts]
