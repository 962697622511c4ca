"""HTML pages: the report of a run, and samples of a data set; model cards."""

from frozenprefix.interpret.card import read_run, write_card
from frozenprefix.interpret.report import write_report
from frozenprefix.interpret.samples import write_samples

__all__ = ["read_run", "write_card", "write_report", "write_samples"]
