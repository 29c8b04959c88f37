"""The HTML report of a checkpoint, made from the checkpoint and its log."""

from halfplate.report.page import REPORT_FILE, write_report

__all__ = ["REPORT_FILE", "write_report"]
