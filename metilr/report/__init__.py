"""The report page: what an evaluation found, to be looked at from disk, without a server or a network."""

from metilr.report.page import write_report

__all__ = ["write_report"]
