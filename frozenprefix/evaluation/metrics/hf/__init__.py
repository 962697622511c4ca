"""The metrics as `evaluate.Metric` objects, loaded from this package without a network.

    cider = load_metric("cider_d")
    cider.compute(predictions=["a dog runs"], references=[["a dog is running", "the dog runs"]])

`evaluate.load` fetches a script for every metric; these metrics need none, and are otherwise used in the same way:
`compute`, `add`, `add_batch`, `evaluate.combine`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from frozenprefix.registry import Registry

if TYPE_CHECKING:
    import evaluate

_HERE = "frozenprefix.evaluation.metrics.hf"
METRICS: Registry[type[evaluate.Metric]] = Registry(
    "metric",
    {
        "bleu": f"{_HERE}.captions:Bleu",
        "cider_d": f"{_HERE}.captions:CiderD",
        "classification": f"{_HERE}.answers:Classification",
        "clip_score": f"{_HERE}.images:ClipScore",
        "diversity": f"{_HERE}.captions:Diversity",
        "exact_match": f"{_HERE}.answers:ExactMatch",
        "meteor": f"{_HERE}.captions:Meteor",
        "retrieval": f"{_HERE}.images:Retrieval",
        "rouge_l": f"{_HERE}.captions:RougeL",
        "spice": f"{_HERE}.captions:Spice",
        "vqa_accuracy": f"{_HERE}.answers:VqaAccuracy",
        "wups": f"{_HERE}.answers:Wups",
    },
)


def load_metric(name: str, **options: Any) -> evaluate.Metric:
    """Create a metric.

    Args:
        name: one of `METRICS.names()`.
        options: those of `evaluate.Metric`, such as `experiment_id`, `num_process` and `process_id`.

    Raises:
        ConfigError: for an unknown name; the message suggests the nearest one.

    Example:
        >>> metric = load_metric("exact_match")
        >>> metric.compute(predictions=["Red"], references=[["red"]])["exact_match"]
        1.0
    """
    return METRICS.get(name)(**options)
