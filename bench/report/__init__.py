"""The report: one HTML file to open, a model card, and the table that both and the terminal share."""

from __future__ import annotations

from .build import ReportFiles, build_report
from .facts import ArtifactFacts, DataFacts, DistillFacts, ModelFacts, RunFacts, StageFacts
from .table import Table, summary_rows, summary_table

__all__ = [
    "ArtifactFacts",
    "DataFacts",
    "DistillFacts",
    "ModelFacts",
    "ReportFiles",
    "RunFacts",
    "StageFacts",
    "Table",
    "build_report",
    "summary_rows",
    "summary_table",
]
