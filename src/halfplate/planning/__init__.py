"""The plan of a compression: the format of every matrix, and the required memory, disk space and time, before anything is computed."""

from halfplate.planning.making import foreign_packages, make_plan, plan_source
from halfplate.planning.plan import MatrixPlan, Plan

__all__ = ["MatrixPlan", "Plan", "foreign_packages", "make_plan", "plan_source"]
