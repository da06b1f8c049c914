"""Watches runs: the report."""

from .report import ReportCallback, write_report

__all__ = ["ReportCallback", "write_report"]
