"""SQLite: runs in one database, one row a measurement and one a sample, so that SQL can follow a number over time.

A run is appended in one transaction: whole or not at all, and two commands that write at once wait for each other.
"""

from __future__ import annotations

import contextlib
import datetime
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import BadInput, ResourceExhausted
from ...files import canonical_json, hash_json
from ..records import Measurement
from .results import Results

__all__ = ["APPLICATION_ID", "SCHEMA", "append_sqlite"]

APPLICATION_ID = 0x65737431  # "est1": how a database of ours is told from another program's
_VERSION = 1
_WAIT_SECONDS = 60.0

SCHEMA = """
CREATE TABLE run (
    id INTEGER PRIMARY KEY, written_at TEXT NOT NULL, edgestill TEXT NOT NULL
);
CREATE TABLE description (sha256 TEXT PRIMARY KEY, json TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE measurement (
    id INTEGER PRIMARY KEY, run INTEGER NOT NULL REFERENCES run,
    target TEXT NOT NULL, subject TEXT NOT NULL, metric TEXT NOT NULL, unit TEXT NOT NULL,
    source TEXT NOT NULL CHECK (source IN ('measured', 'emulated', 'predicted')), origin TEXT,
    value REAL, low REAL, high REAL, level REAL, statistic TEXT, n INTEGER, reason TEXT,
    against TEXT, data TEXT, context INTEGER, kv_dtype TEXT, threads INTEGER NOT NULL,
    runtime TEXT NOT NULL, runtime_version TEXT NOT NULL, backend TEXT NOT NULL, device TEXT NOT NULL,
    artifact_id TEXT NOT NULL,
    protocol TEXT NOT NULL REFERENCES description, environment TEXT NOT NULL REFERENCES description
);
CREATE INDEX measurement_of ON measurement (metric, subject, target);
CREATE TABLE sample (
    measurement INTEGER NOT NULL REFERENCES measurement, launch INTEGER NOT NULL, position INTEGER NOT NULL,
    value REAL NOT NULL, PRIMARY KEY (measurement, launch, position)
) WITHOUT ROWID;
CREATE TABLE percentile (
    measurement INTEGER NOT NULL REFERENCES measurement, name TEXT NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (measurement, name)
) WITHOUT ROWID;
CREATE TABLE comparison (
    id INTEGER PRIMARY KEY, run INTEGER NOT NULL REFERENCES run, target TEXT NOT NULL, metric TEXT NOT NULL,
    subject TEXT NOT NULL, baseline TEXT NOT NULL, outcome TEXT NOT NULL, ratio REAL, low REAL, high REAL,
    noise_floor REAL, reason TEXT NOT NULL
);
CREATE TABLE verdict_check (
    id INTEGER PRIMARY KEY, run INTEGER NOT NULL REFERENCES run, artifact_id TEXT NOT NULL, subject TEXT NOT NULL,
    level TEXT NOT NULL, question TEXT NOT NULL, name TEXT NOT NULL, passed INTEGER NOT NULL, value REAL,
    "limit" REAL, sense TEXT NOT NULL, unit TEXT NOT NULL, reason TEXT NOT NULL
);
"""


def append_sqlite(results: Results, path: Path) -> None:
    """Add one run to the database ``path``, which is made when it is not there.

    Raises :class:`BadInput` for a file that is no database, or one of another program or of a newer edgestill, and
    :class:`ResourceExhausted` when the disk is full; nothing of the run is there then.
    """
    with _errors(path), contextlib.closing(sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None)) as base:
        base.execute("PRAGMA foreign_keys = ON")
        base.execute("BEGIN IMMEDIATE")  # waits here for another writer; the table's state is read after that
        try:
            _prepare(base, path)
            _append(base, results)
            base.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # a full disk has rolled back by itself
                base.execute("ROLLBACK")
            raise


def _prepare(base: sqlite3.Connection, path: Path) -> None:
    application = base.execute("PRAGMA application_id").fetchone()[0]
    version = base.execute("PRAGMA user_version").fetchone()[0]
    empty = not base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if empty:
        for statement in SCHEMA.split(";"):
            if statement.strip():
                base.execute(statement)
        base.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        base.execute(f"PRAGMA user_version = {_VERSION}")
    elif application != APPLICATION_ID:
        raise BadInput(f"{path} is a database of another program", hint="choose another file")
    elif version != _VERSION:
        raise BadInput(f"{path} has schema {version}, this edgestill writes {_VERSION}", hint="choose another file")


def _append(base: sqlite3.Connection, results: Results) -> None:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    run = _insert(base, "run", {"written_at": now, "edgestill": __version__})
    for row in results.measurements:
        _measurement(base, run, row)
    for one in results.comparisons:
        _insert(base, "comparison", {
            "run": run, "target": getattr(one, "target", "host"), "metric": one.metric, "subject": one.subject,
            "baseline": one.baseline, "outcome": one.outcome, "ratio": one.ratio, "low": one.low, "high": one.high,
            "noise_floor": one.noise_floor, "reason": one.reason,
        })  # fmt: skip
    for verdict in results.verdicts:
        for check in verdict.checks:
            _insert(base, "verdict_check", {
                "run": run, "artifact_id": verdict.artifact_id, "subject": verdict.subject, "level": verdict.level,
                "question": check.question, "name": check.name, "passed": check.passed, "value": check.value,
                "limit": check.limit, "sense": check.sense, "unit": check.unit, "reason": check.reason,
            })  # fmt: skip


def _measurement(base: sqlite3.Connection, run: int, row: Measurement) -> None:
    summary = row.summary
    headline: dict[str, Any] = {}
    if summary is not None:
        headline = {"value": summary.value, "low": summary.low, "high": summary.high, "level": summary.level,
                    "statistic": summary.statistic, "n": summary.n}  # fmt: skip
    same = (
        "target", "subject", "metric", "unit", "source", "origin", "reason", "against", "data", "context", "kv_dtype",
        "threads", "runtime", "runtime_version", "backend", "device", "artifact_id",
    )  # fmt: skip
    number = _insert(base, "measurement", {
        "run": run, **{name: getattr(row, name) for name in same}, **headline,
        "protocol": _describe(base, row.protocol), "environment": _describe(base, row.environment),
    })  # fmt: skip
    samples = [
        (number, launch, position, float(value))
        for launch, values in enumerate(row.samples) for position, value in enumerate(values)
    ]  # fmt: skip
    base.executemany("INSERT INTO sample VALUES (?, ?, ?, ?)", samples)
    if summary is not None:
        rows = [(number, name, float(value)) for name, value in summary.percentiles.items()]
        base.executemany("INSERT INTO percentile VALUES (?, ?, ?)", rows)


def _describe(base: sqlite3.Connection, value: Any) -> str:
    """The key of a JSON object that many rows share."""
    digest = hash_json(dict(value))
    base.execute("INSERT OR IGNORE INTO description VALUES (?, ?)", (digest, canonical_json(dict(value))))
    return digest


def _insert(base: sqlite3.Connection, table: str, values: dict[str, Any]) -> int:
    """Names of tables and columns are ours; values are bound."""
    columns = ", ".join(f'"{name}"' for name in values)
    marks = ", ".join("?" * len(values))
    return int(base.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", tuple(values.values())).lastrowid or 0)


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code is not None and code & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            raise ResourceExhausted(
                f"no space left while writing {path}", hint="free some room, then run the same command again"
            ) from error
        if code is not None and code & 0xFF == sqlite3.SQLITE_BUSY:
            text = f"{path} is being written by another program for more than {_WAIT_SECONDS:g} s"
            raise BadInput(text, hint="try again, or choose another file") from error
        raise BadInput(f"{path} is not a database that can be written: {error}", hint="choose another file") from error
