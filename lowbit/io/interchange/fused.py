"""Linears that inference engines multiply as one matrix: they must be of one format in every file that engines read."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping

from lowbit.errors import ExportError

MEMBERS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What vLLM and SGLang call a fused linear, and its members; the experts of a layer are fused too."""

_OF = {member: fused for fused, members in MEMBERS.items() for member in members}
_EXPERTS = re.compile(r"(.+\.experts)\.\d+\..+")


def fused_groups(sites: Iterable[str]) -> dict[str, list[str]]:
    """The sites that are fused with others, by the name that engines give to the whole."""
    groups: dict[str, list[str]] = {}
    for site in sites:
        parent, _, leaf = site.rpartition(".")
        if match := _EXPERTS.fullmatch(site):
            groups.setdefault(match[1], []).append(site)
        elif leaf in _OF:
            groups.setdefault(f"{parent}.{_OF[leaf]}".lstrip("."), []).append(site)
    return {name: members for name, members in groups.items() if len(members) > 1}


def require_alike(kinds: Mapping[str, Hashable]) -> None:
    """Raises ExportError naming two sites that are fused but not of one kind (which should say what it is, as text)."""
    for name, members in fused_groups(kinds).items():
        for other in members[1:]:
            if kinds[members[0]] != kinds[other]:
                raise ExportError(
                    f"{members[0]} is {kinds[members[0]]}, {other} is {kinds[other]}", where=name,
                    why="engines multiply them as one matrix, in one format",
                    fix="one format for all of them, by the [[override]] entries of the recipe",
                )  # fmt: skip
