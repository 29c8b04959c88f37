"""The report: what a checkpoint and its log say, gathered, drawn, and put on one self-contained page."""

from halfplate.report.page import REPORT_FILE, write_report

__all__ = ["REPORT_FILE", "write_report"]
