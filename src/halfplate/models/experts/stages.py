"""The matrices of the experts of a module, which receive their inputs at the same time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LINEAR = re.compile(r"(.*)\.(\d+)\.(gate_proj|up_proj|down_proj)")


@dataclass(frozen=True)
class ExpertStage:
    """The experts of one module, which receive their inputs at the same time.

    module: its full name.
    experts: the matrices to compress of each expert, by its number.
    """

    module: str
    experts: Mapping[int, Sequence[str]]

    def unit(self, number: int) -> str:
        """The name of an expert, and of its artifact."""
        return f"{self.module}.{number}"

    @property
    def names(self) -> list[str]:
        """The matrices of all experts."""
        return [name for names in self.experts.values() for name in names]


def expert_stages(names: Sequence[str], modules: Sequence[str]) -> dict[str, ExpertStage]:
    """Those of `names` that belong to experts, by module. modules: names of the experts modules of the model."""
    found: dict[str, dict[int, list[str]]] = {}
    for name in names:
        match = LINEAR.fullmatch(name)
        if match is not None and match[1] in modules:
            found.setdefault(match[1], {}).setdefault(int(match[2]), []).append(name)
    return {module: ExpertStage(module, experts) for module, experts in found.items()}
