"""Optimizers, parameter roles and learning-rate schedules."""

from serval.optim.builder import OPTIMIZERS, READS, MixedOptimizer, OptimizerOptions, build
from serval.optim.groups import NamedParameter, Role, RoleOptions, route
from serval.optim.mona import Mona
from serval.optim.muon import Muon
from serval.optim.schedules import SCHEDULES, Schedule

__all__ = [
    "OPTIMIZERS",
    "READS",
    "SCHEDULES",
    "MixedOptimizer",
    "Mona",
    "Muon",
    "NamedParameter",
    "OptimizerOptions",
    "Role",
    "RoleOptions",
    "Schedule",
    "build",
    "route",
]
