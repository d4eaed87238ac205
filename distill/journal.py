"""``training.jsonl``: one line an optimiser step, which survives kills and forgets what will be done again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..files import atomic_write, canonical_json, disk_errors

__all__ = ["Journal", "Row"]

Row = dict[str, Any]


class Journal:
    """Rows ``{"step": n, ...}`` in a file; no time and no path in them, so that equal runs write equal files.

    A step's row has its losses. A row with ``dev`` has metrics: of the cut (step 0), of a measurement on the way (it
    has ``waited``, the measurements since the best one), and last, of the student. ``path=None``: in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[Row] = []

    def rewind(self, step: int) -> None:
        """Keep what was written up to the end of ``step``; drop later rows, closing metrics and a half-written line."""
        self.rows = []
        if self.path is None:
            return
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    break
                if row["step"] <= step and (row["step"] == 0 or "dev" not in row or "waited" in row):
                    self.rows.append(row)
        atomic_write(self.path, self.text())

    def append(self, row: Row) -> None:
        """Add a row; it is in the file when this returns."""
        self.rows.append(row)
        if self.path is None:
            return
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(canonical_json(row) + "\n")

    def sync(self) -> None:
        """Force it to disk, before a checkpoint that counts on it."""
        if self.path is None:
            return
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as stream:
            os.fsync(stream.fileno())

    def text(self) -> str:
        """The whole file."""
        return "".join(canonical_json(row) + "\n" for row in self.rows)
