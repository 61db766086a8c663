"""The report stage: what was won and what it cost, on one page that opens in any browser."""

from distill.stages.report.spec import Report

__all__ = ["Report"]
