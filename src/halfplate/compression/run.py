"""The state of a running compression that all its steps share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from halfplate.calibration import CalibrationTokens
from halfplate.compression.open_layer import LayerView, OpenLayers
from halfplate.compression.work_folder import WorkFolder
from halfplate.engines import Engine
from halfplate.methods.solving import MatrixRecord
from halfplate.models.sources import Source
from halfplate.planning import Plan
from halfplate.telemetry.clock import Clock
from halfplate.telemetry.progress import Report


@dataclass
class Run:
    """The state of a running compression.

    source: the model, whose tensors can be read one by one.
    layers: the layer that this process has open.
    tables: records of the embedding and the head.
    """

    source: Source
    plan: Plan
    threads: int
    tokens: CalibrationTokens | None
    work: WorkFolder
    engine: Engine
    layers: OpenLayers
    report: Report
    clock: Clock
    tables: list[MatrixRecord] = field(default_factory=list)

    @cached_property
    def names(self) -> dict[int, list[str]]:
        """The matrices to compress, by layer."""
        names: dict[int, list[str]] = defaultdict(list)
        for matrix in self.plan.matrices:
            if matrix.name in self.plan.layer_specs:
                assert matrix.block is not None
                names[matrix.block].append(matrix.name)
        return names

    @cached_property
    def uses(self) -> dict[str, dict[int, str]]:
        """Of each matrix whose weight later layers use, too: the name that it has in each of them."""
        uses: dict[str, dict[int, str]] = defaultdict(dict)
        for name, matrix in self.plan.borrowed.items():
            assert matrix.spec is not None
            assert matrix.spec.same_as is not None
            assert matrix.block is not None
            uses[matrix.spec.same_as][matrix.block] = name
        return dict(uses)

    @cached_property
    def _layer_of(self) -> dict[str, int]:
        return {name: layer for layer, names in self.names.items() for name in names}

    @property
    def last(self) -> int:
        """The last layer with compressed matrices, or with those of an earlier layer."""
        return max(*self.names, *(layer for uses in self.uses.values() for layer in uses), 0)

    def view(self, layer: int, finished: Mapping[str, Path]) -> LayerView:
        """The state of a layer with the matrices in `finished` compressed."""
        recipe = self.plan.recipe
        name = str(self.work.path)
        return LayerView(
            name,
            self.source,
            recipe.device,
            recipe.precision,
            self.threads,
            layer,
            dict(finished),
            self.plan.memory.remembered,
        )

    def artifacts(self, layer: int) -> dict[str, Path]:
        """The artifact of each matrix of a finished layer."""
        return {name: self.work.layer(layer) for name in self.names[layer]} | self.borrowed(layer)

    def borrowed(self, layer: int) -> dict[str, Path]:
        """The artifact of each matrix of a layer whose weight is that of an earlier one."""
        return {
            uses[layer]: self.work.layer(self._layer_of[owner]) for owner, uses in self.uses.items() if layer in uses
        }
