"""What shows a run to its user: the report, trackers, and the display of a notebook."""

from .notebook import NotebookCallback
from .report import ReportCallback, write_report

__all__ = ["NotebookCallback", "ReportCallback", "write_report"]
