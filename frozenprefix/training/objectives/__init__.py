"""Training objectives: one file each, one contract (`Objective`), and their weighted sum."""

from frozenprefix.training.objectives.base import Objective
from frozenprefix.training.objectives.contrastive import Contrastive
from frozenprefix.training.objectives.distillation import Distillation
from frozenprefix.training.objectives.language_model import NextToken
from frozenprefix.training.objectives.self_critical import SelfCritical
from frozenprefix.training.objectives.weighted_sum import WeightedSum

__all__ = ["Contrastive", "Distillation", "NextToken", "Objective", "SelfCritical", "WeightedSum"]
