"""HTML pages: the report of a run, and samples of a data set."""

from frozenprefix.interpret.report import write_report
from frozenprefix.interpret.samples import write_samples

__all__ = ["write_report", "write_samples"]
