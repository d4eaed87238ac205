"""``training.jsonl``: one line an optimiser step, which survives kills and forgets what will be done again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..files import atomic_write, canonical_json, disk_errors

__all__ = ["Journal"]

Row = dict[str, Any]


class Journal:
    """Rows ``{"step": n, ...}`` in a file; no time and no path in them, so that equal runs write equal files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []

    def rewind(self, step: int) -> None:
        """Keep what was written up to the end of ``step``; drop later rows, closing metrics and a half-written line."""
        self.rows = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    break
                if row["step"] <= step and (row["step"] == 0 or "dev" not in row):
                    self.rows.append(row)
        atomic_write(self.path, self.text())

    def append(self, row: Row) -> None:
        """Add a row; it is in the file when this returns."""
        self.rows.append(row)
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(canonical_json(row) + "\n")

    def sync(self) -> None:
        """Force it to disk, before a checkpoint that counts on it."""
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as stream:
            os.fsync(stream.fileno())

    def text(self) -> str:
        """The whole file."""
        return "".join(canonical_json(row) + "\n" for row in self.rows)
