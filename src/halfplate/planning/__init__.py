"""The plan: what a compression will do to every matrix, and what it takes, known before anything is computed."""

from halfplate.planning.making import foreign_packages, make_plan, plan_source
from halfplate.planning.plan import MatrixPlan, Plan

__all__ = ["MatrixPlan", "Plan", "foreign_packages", "make_plan", "plan_source"]
