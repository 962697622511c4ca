"""Training: `train` for mappers, `train_contrastive` for locked-image tuning."""

from typing import TYPE_CHECKING

from frozenprefix.registry import lazy_exports

if TYPE_CHECKING:
    from frozenprefix.training.base_trainer import BaseTrainer
    from frozenprefix.training.caching import fill_cache
    from frozenprefix.training.callbacks import Callbacks
    from frozenprefix.training.contrastive import ContrastiveTrainer, train_contrastive
    from frozenprefix.training.objectives import Objective
    from frozenprefix.training.registry import train_recipe
    from frozenprefix.training.result import TrainingResult
    from frozenprefix.training.setup import build_locked_model, build_model, load_samples
    from frozenprefix.training.tracking import read_log
    from frozenprefix.training.trainer import Trainer, train
    from frozenprefix.training.validation import validation_losses

__all__ = [
    "BaseTrainer",
    "Callbacks",
    "ContrastiveTrainer",
    "Objective",
    "Trainer",
    "TrainingResult",
    "build_locked_model",
    "build_model",
    "fill_cache",
    "load_samples",
    "read_log",
    "train",
    "train_contrastive",
    "train_recipe",
    "validation_losses",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "base_trainer": ("BaseTrainer",),
        "caching": ("fill_cache",),
        "callbacks": ("Callbacks",),
        "contrastive": ("ContrastiveTrainer", "train_contrastive"),
        "objectives": ("Objective",),
        "registry": ("train_recipe",),
        "result": ("TrainingResult",),
        "setup": ("build_locked_model", "build_model", "load_samples"),
        "tracking": ("read_log",),
        "trainer": ("Trainer", "train"),
        "validation": ("validation_losses",),
    },
)
