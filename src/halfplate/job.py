"""A recipe with everything that is derived from it, which planning, engines and tasks read."""

from dataclasses import dataclass
from functools import cached_property

from halfplate.methods import Method
from halfplate.recipe import Recipe
from halfplate.statistics import Statistic
from halfplate.transforms import MeasuredTransform, find


@dataclass(frozen=True)
class Job:
    """A resolved compression. asked: statistics to collect at least, whatever the method requires."""

    recipe: Recipe
    asked: Statistic = Statistic.NONE

    @cached_property
    def method(self) -> Method:
        """The method with its options."""
        return self.recipe.create_method()

    @cached_property
    def statistic(self) -> Statistic:
        """The statistics that are collected."""
        return max(self.asked, self.method.requires)

    @cached_property
    def runs_text(self) -> bool:
        """Whether calibration text runs through the model."""
        recipe = self.recipe
        chooses = recipe.tune_block > 0 or recipe.budgeted or recipe.ratios != "uniform"
        return self.statistic > Statistic.NONE or chooses

    @cached_property
    def measures(self) -> bool:
        """Whether a transform collects statistics of the original model on the calibration text."""
        return any(isinstance(find(label), MeasuredTransform) for label in self.recipe.transforms)

    @property
    def reads_text(self) -> bool:
        """Whether there is a calibration text at all."""
        return self.runs_text or self.measures

    @cached_property
    def corrects(self) -> bool:
        """Whether matrices are corrected towards the original outputs, which needs Gram matrices and the original inputs."""
        recipe = self.recipe
        return recipe.inputs == "compressed" and recipe.cross_damping != "none" and self.statistic >= Statistic.GRAM

    @cached_property
    def streams(self) -> int:
        """How often the text runs through the layers: once, or also through the original layers."""
        return 2 if self.corrects or self.recipe.tune_block else 1
