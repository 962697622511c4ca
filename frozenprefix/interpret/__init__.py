"""Reports about a run."""

from frozenprefix.interpret.report import write_report

__all__ = ["write_report"]
