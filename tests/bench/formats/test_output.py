"""Results in other tools' formats: each read back by an independent reader."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import sqlite3
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from edgestill.bench.compare import Comparison
from edgestill.bench.formats.csv_table import COLUMNS, to_csv
from edgestill.bench.formats.junit import to_junit
from edgestill.bench.formats.llama_bench import FIELDS, to_llama_bench
from edgestill.bench.formats.markdown import to_markdown
from edgestill.bench.formats.output import FORMATS, Results, check_output, write_results
from edgestill.bench.gates import GateResult
from edgestill.bench.records import Check, Measurement, Summary, Verdict, read_measurements
from edgestill.errors import BadInput, UsageError

NASTY = 'it\'s | a "model" <b>&</b>, `x` 100% _é_'


def row(metric: str, value: float | None, unit: str, *, subject: str = NASTY, samples=None, **more) -> Measurement:
    taken = samples or ([[value]] if value is not None else [])
    summary = None
    if value is not None:
        n = sum(map(len, taken))
        summary = Summary(value, "median", n, value * 0.9, value * 1.1, percentiles={"p50": value})
    return Measurement(**{
        "subject": subject, "metric": metric, "unit": unit, "source": "measured", "summary": summary,
        "samples": tuple(map(tuple, taken)), "artifact_id": "ab" * 32, "runtime": "llama.cpp",
        "runtime_version": "0.3.36", "backend": "cpu", "device": "Xeon (Linux x86_64, 2 cores)", "threads": 2,
        "protocol": {"length": 64, "new_tokens": 17}, "environment": {"cpu": "Xeon", "busy": False},
        "placement": {"kv:f16": 1}, "context": 64, "reason": None if value is not None else "no such\nsensor", **more,
    })  # fmt: skip


@pytest.fixture
def results() -> Results:
    rows = (
        row("model_bytes", 1000.0, "bytes"), row("bits_per_weight", 4.0, "bits"),
        row("latency_ms", 0.1 + 0.2, "ms", samples=[[0.3, 0.1 + 0.2], [0.4]]),
        row("prefill_tokens_per_s", 640.0, "tok/s", samples=[[600.0, 640.0], [680.0]]),
        row("decode_tokens_per_s", 32.0, "tok/s", samples=[[32.0], [31.0], [33.0]]),
        row("peak_memory_bytes", None, "bytes"),
        row("latency_ms", 2.0, "ms", subject="=HYPERLINK(1)", target="web"),
    )  # fmt: skip
    compared = (
        Comparison("latency_ms", NASTY, "base", "better", 0.5, 0.4, 0.6, 0.01),
        Comparison("load_ms", NASTY, "base", "unknown", reason="not measured"),
    )
    checks = (
        Check("cosine", "faithful", True, 0.999, 0.99, "at_least"),
        Check("weights", "integrity", False, 0.5, 0.01, reason="off\x00grid", worst_input="a <text>"),
    )
    verdict = Verdict("ab" * 32, NASTY, "failed", checks, "llama.cpp", "0.3.36", "cpu", "Xeon")
    gates = (
        GateResult("kl", NASTY, "pass", 0.1, "at_most", 0.05),
        GateResult("kl", "other", "fail", 0.1, "at_most", 0.2, reason="0.2 is not at most 0.1"),
        GateResult("kl", "third", "inconclusive", 0.1, "at_most", 0.1),
    )
    return Results(rows, compared, (verdict,), gates, (), (("ssh://board", "unreachable"),))


def test_json_lines_are_measurements(results, tmp_path):
    write_results(results, tmp_path / "a 'b'.jsonl")
    assert read_measurements(tmp_path / "a 'b'.jsonl") == list(results.measurements)


def test_csv_is_read_back_exactly(results):
    """By csv of the standard library; floats by repr."""
    read = list(csv.DictReader(io.StringIO(to_csv(results), newline="")))
    assert len(read) == len(results.measurements)
    assert tuple(read[0]) == COLUMNS
    for line, wanted in zip(read, results.measurements, strict=True):
        assert line["subject"].removeprefix("'") == wanted.subject
        assert line["value"] == ("" if wanted.summary is None else repr(wanted.summary.value))
        assert line["metric"] == wanted.metric
        assert not line["subject"].startswith("=")  # a spreadsheet would run it
    assert float(read[2]["value"]) == 0.1 + 0.2
    assert (read[2]["samples"], read[2]["launches"]) == ("3", "2")
    assert read[5]["reason"] == "no such\nsensor"


def test_the_page_describes_every_column():
    page = (Path(__file__).parents[3] / "docs" / "formats-out.md").read_text(encoding="utf-8")
    assert [name for name in (*COLUMNS, *FORMATS) if f"`{name}`" not in page] == []


def test_markdown_keeps_its_tables_whatever_a_name_is(results):
    """Each table line has the cells of its header: no name breaks out of one, none becomes HTML."""
    text = to_markdown(results)
    width = 0
    for line in text.splitlines():
        if not line.startswith("| "):
            width = 0
            continue
        cells = line.replace("\\|", "").strip().strip("|").split("|")
        assert width in (0, len(cells)), line
        width = len(cells)
    assert "<b>" not in text
    assert "## host" in text
    assert "## web" in text
    assert "0.50× ✔" in text
    assert "no such sensor" in text


def test_llama_bench_has_its_fields_in_its_order_and_true_numbers(results):
    prefill, decode = json.loads(to_llama_bench(results))
    assert tuple(prefill) == tuple(decode) == FIELDS
    assert (prefill["n_prompt"], prefill["n_gen"], prefill["n_depth"]) == (64, 0, 0)
    assert (decode["n_prompt"], decode["n_gen"], decode["n_depth"]) == (0, 16, 64)
    assert prefill["samples_ts"] == [600.0, 640.0, 680.0]
    assert prefill["samples_ns"] == [round(64 / speed * 1e9) for speed in (600, 640, 680)]
    assert prefill["avg_ts"] == 640.0
    assert prefill["stddev_ts"] == pytest.approx(40.0)
    assert (decode["model_size"], decode["model_n_params"], decode["type_k"]) == (1000, 2000, "f16")
    assert decode["n_batch"] is None  # not known here
    assert to_llama_bench(Results()) == "[]\n"


def test_junit_keeps_the_structure_that_ci_servers_read(results):
    """Ant's schema: order of elements, required attributes and their types; the counts are those of the elements."""
    root = ET.fromstring(to_junit(results, now=datetime.datetime(2026, 7, 1, 12, 0, 0)))
    assert (root.tag, root.attrib) == ("testsuites", {})
    assert [suite.get("name") for suite in root] == ["verdicts", "gates", "comparisons", "measurements"]
    for number, suite in enumerate(root):
        assert set(suite.attrib) == {"name", "package", "id", "timestamp", "hostname", "tests", "failures", "errors",
                                     "skipped", "time"}  # fmt: skip
        assert (suite.get("id"), suite.get("timestamp"), suite.get("hostname")) == (
            str(number), "2026-07-01T12:00:00", "localhost",
        )  # fmt: skip
        cases = suite.findall("testcase")
        assert [child.tag for child in suite] == ["properties", *["testcase"] * len(cases), "system-out", "system-err"]
        for kind, name in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            assert int(suite.get(name)) == len(suite.findall(f"testcase/{kind}"))
        for case in cases:
            assert set(case.attrib) == {"name", "classname", "time"}
            assert float(case.get("time")) >= 0
            assert len(case) <= 1
            for child in case:
                assert child.tag in ("skipped", "error", "failure")
                assert child.get("message")
                assert child.get("type")
    counts = {suite.get("name"): (suite.get("failures"), suite.get("errors"), suite.get("skipped")) for suite in root}
    assert counts == {"verdicts": ("1", "0", "0"), "gates": ("1", "0", "1"), "comparisons": ("0", "0", "1"),
                      "measurements": ("0", "1", "1")}  # fmt: skip
    assert "latency_ms against base" in {case.get("name") for case in root.iter("testcase")}


def test_sqlite_is_asked_with_sql(results, tmp_path):
    path = tmp_path / 'it\'s "one".db'
    write_results(results, path)
    write_results(results, path)
    with sqlite3.connect(path) as base:
        assert base.execute("SELECT count(*) FROM run").fetchone() == (2,)
        found = base.execute(
            "SELECT avg(s.value), count(*) FROM sample s JOIN measurement m ON s.measurement = m.id "
            "WHERE m.metric = 'prefill_tokens_per_s' AND m.subject = ?", (NASTY,),
        ).fetchone()  # fmt: skip
        assert found == (640.0, 6)
        assert base.execute("SELECT count(*) FROM description").fetchone() == (2,)  # shared
        assert base.execute("SELECT reason FROM measurement WHERE value IS NULL").fetchone() == ("no such\nsensor",)
        assert base.execute("SELECT outcome, ratio FROM comparison").fetchone() == ("better", 0.5)
        assert base.execute("SELECT count(*) FROM verdict_check WHERE NOT passed").fetchone() == (2,)
        assert base.execute("PRAGMA foreign_key_check").fetchall() == []
        assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_runs_at_once_all_arrive(tmp_path):
    """Four processes make and fill one database."""
    script = """
import sys
from pathlib import Path
from edgestill.bench.formats.output import Results, write_results
from edgestill.bench.records import Measurement, Summary
summary = Summary(1.0, "median", 1)
row = Measurement("a", "latency_ms", "ms", "measured", summary, ((1.0,),), "", "x", "", "", "d", 1, {}, {})
for _ in range(5):
    write_results(Results((row,) * 20), Path(sys.argv[1]))
"""
    path = tmp_path / "shared.sqlite"
    running = [subprocess.Popen([sys.executable, "-c", script, path], stderr=subprocess.PIPE) for _ in range(4)]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
    with sqlite3.connect(path) as base:
        assert base.execute("SELECT count(*) FROM run").fetchone() == (20,)
        assert base.execute("SELECT count(*), count(DISTINCT run) FROM measurement").fetchone() == (400, 20)


def test_a_database_of_another_program_is_left_alone(results, tmp_path):
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as base:
        base.execute("CREATE TABLE run (id INTEGER)")
    before = other.read_bytes()
    with pytest.raises(BadInput, match="of another program"):
        write_results(results, other)
    (tmp_path / "text.sqlite").write_text("hello " * 500)
    with pytest.raises(BadInput, match="not a database"):
        write_results(results, tmp_path / "text.sqlite")
    assert other.read_bytes() == before


def test_a_run_is_whole_or_not_there(results, tmp_path):
    """A row that the schema refuses, in the middle."""
    path = tmp_path / "a.sqlite"
    write_results(results, path)
    bad = dataclasses.replace(results.measurements[0], source="guessed")
    with pytest.raises(BadInput):
        write_results(dataclasses.replace(results, measurements=(*results.measurements, bad)), path)
    with sqlite3.connect(path) as base:
        assert base.execute("SELECT count(*) FROM run").fetchone() == (1,)
        assert base.execute("SELECT count(*) FROM measurement").fetchone() == (len(results.measurements),)


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_leaves_what_was_there(results, tmp_path, form):
    """The kernel's own limit on file sizes, in a process of its own (SIGXFSZ is ignored by Python)."""
    path = tmp_path / f"x{FORMATS[form].endings[0]}"
    if form == "sqlite":
        write_results(results, path)
    else:
        path.write_text("old")
    before = path.read_bytes()
    script = f"""
import pickle, resource, sys
from pathlib import Path
from edgestill.bench.formats.output import write_results
from edgestill.errors import ResourceExhausted
results = pickle.loads(Path(sys.argv[2]).read_bytes())
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) if form == "sqlite" else 64}, -1))
try:
    write_results(results, Path(sys.argv[1]))
except ResourceExhausted as error:
    print("told", error.message)
"""
    import pickle

    many = dataclasses.replace(results, measurements=results.measurements * 200)
    (tmp_path / "results.pickle").write_bytes(pickle.dumps(many))
    done = subprocess.run(
        [sys.executable, "-c", script, path, tmp_path / "results.pickle"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("told"), done.stderr
    assert str(path) in done.stdout
    if form != "sqlite":
        assert path.read_bytes() == before
    else:
        with sqlite3.connect(path) as base:
            assert base.execute("SELECT count(*) FROM run").fetchone() == (1,)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_name_says_the_format_before_anything_is_measured(tmp_path):
    assert check_output(tmp_path / "r.LLAMA-bench.json") == "llama-bench"
    assert check_output(tmp_path / "r.junit.xml") == "junit"
    with pytest.raises(BadInput, match="there is no folder") as told:
        check_output(tmp_path / "new" / "r.junit.xml")
    assert str(tmp_path / "new") in told.value.hint
    assert check_output(tmp_path / "r.txt", "csv") == "csv"
    with pytest.raises(UsageError, match=r"r\.json: no format has such a name"):
        check_output(tmp_path / "r.json")
    with pytest.raises(UsageError, match="unknown format 'cvs'") as told:
        check_output(tmp_path / "r.csv", "cvs")
    assert "did you mean 'csv'" in told.value.hint
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(BadInput, match="is a folder"):
        check_output(tmp_path / "folder.csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="can't be written"):
        check_output(tmp_path / "file" / "r.csv")


def test_llama_bench_is_what_the_real_one_prints(results):
    """Against our record of its output (-p 8 -n 4 -r 2 -t 1 on a tiny model): fields, order and types. Its averages
    are those of its samples by our formulas, but for integers that it rounds on the way.
    """
    import statistics

    real = json.loads((Path(__file__).parent / "llama_bench_output.json").read_text(encoding="utf-8"))
    ours = json.loads(to_llama_bench(results))
    for theirs, mine in zip(real, ours, strict=True):
        assert tuple(theirs) == tuple(mine)
        for name, value in mine.items():
            kinds = (int, float) if isinstance(theirs[name], float) else type(theirs[name])
            assert value is None or isinstance(value, kinds) or name == "test_time", name
        assert theirs["avg_ts"] == pytest.approx(statistics.fmean(theirs["samples_ts"]), rel=1e-4)
        assert theirs["stddev_ns"] == pytest.approx(statistics.stdev(theirs["samples_ns"]), rel=1e-3)
    assert [(test["n_prompt"], test["n_gen"]) for test in real] == [(8, 0), (0, 4)]


def test_what_was_written_can_be_imported_again(results, tmp_path):
    """The reader of `edgestill bench import` takes our file for llama-bench's."""
    from edgestill.bench.imported.llama_bench import is_ours

    assert is_ours(json.loads(to_llama_bench(results)))
