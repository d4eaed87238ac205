"""JUnit XML for CI servers: verdicts, gates, decisions, comparisons and measurements as test cases.

The structure keeps both schemas that CI servers check against: Ant's (JUnit.xsd of windyroad/JUnit-Schema: attributes,
their types, and the order of elements) and that of Jenkins' xunit plugin (junit-10.xsd). A test case fails exactly
where the command fails: a failed verdict, gate or decision. What can't be told is skipped; so is a number that could
not be taken, with its reason. A target that failed as a whole is an error. Values stand in the suite's ``system-out``.
"""

from __future__ import annotations

import datetime
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..compare import Comparison
from ..gates import GateResult
from ..metrics import METRICS
from ..records import Measurement, Verdict
from .results import Results

__all__ = ["to_junit"]

# Characters that XML 1.0 can't hold in any spelling.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class _Case:
    group: str
    name: str
    outcome: Literal["passed", "failure", "error", "skipped"] = "passed"
    message: str = ""
    seconds: float = 0.0
    line: str = ""


def to_junit(results: Results, *, now: datetime.datetime | None = None) -> str:
    """One suite each for verdicts, gates, comparisons and measurements, as far as there are any. ``now`` (UTC) is what
    the suites are dated with."""
    taken = (now or datetime.datetime.now(datetime.UTC)).strftime("%Y-%m-%dT%H:%M:%S")
    suites = {
        "verdicts": list(_verdicts(results.verdicts)),
        "gates": [*_gates(results.gates), *_decisions(results.decisions)],
        "comparisons": list(_comparisons(results.comparisons)),
        "measurements": [*_measurements(results.measurements), *_problems(results.problems)],
    }
    root = ET.Element("testsuites")
    for number, (name, cases) in enumerate((name, cases) for name, cases in suites.items() if cases):
        root.append(_suite(number, name, cases, taken))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(number: int, name: str, cases: Sequence[_Case], taken: str) -> ET.Element:
    counts = {kind: sum(case.outcome == kind for case in cases) for kind in ("failure", "error", "skipped")}
    suite = ET.Element("testsuite", {
        "name": name, "package": "edgestill", "id": str(number), "timestamp": taken,
        "hostname": "localhost",  # a report is passed on: it names no machine
        "tests": str(len(cases)), "failures": str(counts["failure"]), "errors": str(counts["error"]),
        "skipped": str(counts["skipped"]), "time": _decimal(sum(case.seconds for case in cases)),
    })  # fmt: skip
    ET.SubElement(suite, "properties")
    for case in cases:
        attributes = {"name": _clean(case.name), "classname": _clean(case.group), "time": _decimal(case.seconds)}
        element = ET.SubElement(suite, "testcase", attributes)
        if case.outcome != "passed":
            told = ET.SubElement(element, case.outcome, {"message": _clean(case.message), "type": name})
            told.text = _clean(case.message)
    ET.SubElement(suite, "system-out").text = "".join(f"{_clean(case.line)}\n" for case in cases if case.line)
    ET.SubElement(suite, "system-err")
    return suite


def _verdicts(verdicts: Sequence[Verdict]) -> Iterator[_Case]:
    for verdict in verdicts:
        group = f"verdict.{_part(verdict.subject)}"
        if not verdict.checks:
            outcome: Literal["passed", "failure"] = "passed" if verdict.passed else "failure"
            yield _Case(group, verdict.level, outcome, verdict.note or verdict.level)
        for check in verdict.checks:
            text = (
                f"{verdict.subject} {check.name}: {_bound(check.value, check.limit, check.sense)} {check.unit}".strip()
            )
            more = ", ".join(
                part
                for part in (
                    check.reason,
                    f"worst: {check.worst_input}" if check.worst_input else "",
                    f"first: {check.first_tensor}" if check.first_tensor else "",
                )
                if part
            )
            why = f"{text} ({more})" if more else text
            yield _Case(group, f"{check.question}: {check.name}", _done(check.passed), why, line=text)


def _gates(gates: Sequence[GateResult]) -> Iterator[_Case]:
    for gate in gates:
        more = "".join([f" on {gate.data}" if gate.data else "", f" to {gate.against}" if gate.against else ""])
        text = f"{gate.subject} {gate.metric}{more}: {_bound(gate.value, gate.limit, gate.sense)}"
        outcome: Any = {"pass": "passed", "fail": "failure"}.get(gate.outcome, "skipped")
        name = f"{gate.metric}{more} {gate.sense.replace('_', ' ')} {gate.limit:g}"
        yield _Case(f"gate.{_part(gate.subject)}", name, outcome, gate.reason or text, line=text)


def _decisions(decisions: Sequence[Any]) -> Iterator[_Case]:
    for one in decisions:
        outcome: Any = {"pass": "passed", "fail": "failure"}.get(one.outcome, "skipped")
        text = f"{one.subject} {one.metric}: {one.reason}"
        group = f"slowdown.{_part(one.target)}.{_part(one.subject)}"
        yield _Case(group, f"{one.metric} within {one.limit:.1%}", outcome, text, line=text)


def _comparisons(comparisons: Sequence[Comparison]) -> Iterator[_Case]:
    for one in comparisons:
        decided = one.outcome in ("better", "worse", "same")
        ratio = "" if one.ratio is None else f" {one.ratio:.4g}×"
        interval = "" if one.low is None or one.high is None else f" ({one.low:.4g} to {one.high:.4g})"
        text = f"{one.subject} {one.metric} against {one.baseline}:{ratio}{interval} {one.outcome}"
        target = str(getattr(one, "target", "host"))
        yield _Case(f"comparison.{_part(target)}.{_part(one.subject)}", f"{one.metric} against {one.baseline}",
                    "passed" if decided else "skipped", one.reason or text, line=text)  # fmt: skip


def _measurements(rows: Sequence[Measurement]) -> Iterator[_Case]:
    for row in rows:
        more = "".join(f" {word} {value}" for word, value in (("on", row.data), ("to", row.against)) if value) + (
            f" after {row.context}" if "depth" in row.metric else ""
        )
        group = f"{row.source}.{_part(row.target)}.{_part(row.subject)}"
        if row.summary is None:
            yield _Case(group, row.metric + more, "skipped", row.reason or "not taken")
            continue
        shown = METRICS[row.metric].show(row.summary.value) if row.metric in METRICS else f"{row.summary.value:g}"
        seconds = sum(map(sum, row.samples)) / 1e3 if row.unit == "ms" else 0.0
        yield _Case(group, row.metric + more, seconds=seconds, line=f"{row.subject} {row.metric}{more}: {shown}")


def _problems(problems: Sequence[tuple[str, str]]) -> Iterator[_Case]:
    for target, reason in problems:
        yield _Case(f"target.{_part(target)}", target, "error", reason, line=f"{target}: {reason}")


def _bound(value: float | None, limit: float | None, sense: str) -> str:
    got = "no value" if value is None else f"{value:.6g}"
    return got if limit is None else f"{got}, {sense.replace('_', ' ')} {limit:.6g}"


def _done(passed: bool) -> Literal["passed", "failure"]:
    return "passed" if passed else "failure"


def _part(text: str) -> str:
    """A part of a class name: readers split at dots."""
    return re.sub(r"[.\s]+", "_", text) or "_"


def _decimal(seconds: float) -> str:
    return f"{seconds:.6f}"


def _clean(text: str) -> str:
    return _NOT_XML.sub("\ufffd", " ".join(text.split()))
