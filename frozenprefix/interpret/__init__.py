"""HTML pages: the report of a run, samples of a data set, explanations; model cards."""

from frozenprefix.interpret.card import read_run, write_card
from frozenprefix.interpret.explain import Explainer, Explanation, explain, write_explanations
from frozenprefix.interpret.report import write_report
from frozenprefix.interpret.run_report import read_runs, write_run_report
from frozenprefix.interpret.samples import write_samples

__all__ = [
    "Explainer",
    "Explanation",
    "explain",
    "read_run",
    "read_runs",
    "write_card",
    "write_explanations",
    "write_report",
    "write_run_report",
    "write_samples",
]
