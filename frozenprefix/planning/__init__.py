"""The cost of a recipe before it is run.

Example:
    >>> plan(recipe, ["h100"], calibrate=0).machines["h100"].fits
    True
"""

from frozenprefix.planning.hardware import HARDWARE, Hardware
from frozenprefix.planning.plan import Plan, plan
from frozenprefix.planning.workload import MachinePlan

__all__ = ["HARDWARE", "Hardware", "MachinePlan", "Plan", "plan"]
