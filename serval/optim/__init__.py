"""Optimizers, parameter roles and learning-rate schedules."""

from serval.optim.builder import OPTIMIZERS, MixedOptimizer, OptimizerOptions, build
from serval.optim.groups import NamedParameter, Role, RoleOptions, route
from serval.optim.schedules import SCHEDULES, Schedule

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "MixedOptimizer",
    "NamedParameter",
    "OptimizerOptions",
    "Role",
    "RoleOptions",
    "Schedule",
    "build",
    "route",
]
