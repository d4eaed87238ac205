"""The figures beside other tools: registry, judgement, output; the cheap ones for real, on tiny models."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgestill.errors import EdgestillError, UsageError
from tests.peers import registry
from tests.peers.__main__ import exit_code, main, measure
from tests.peers.context import Context
from tests.peers.environments import LLAMA_CPP_CONVERTER, Environment, prepare
from tests.peers.groups import export, speed
from tests.peers.processes import PROGRAMS, launch_measured
from tests.peers.registry import Figure, Row, Subject, Taken, Unavailable, judge, select

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "tests/peers"
KEYS = ["figure", "value", "unit", "limit", "holds", "how"]

# What issue 2 asks for.
FIRST = ["cli_startup", "export_seconds", "export_peak_memory_bytes", "decode_speed_ratio", "encode_speed_ratio"]


@pytest.fixture(scope="module", autouse=True)
def _groups() -> None:
    registry.load_groups()


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path, tiny=True, repeats=2, threads=1)


def made(limit: float | None = None, sense: registry.Sense = "at_most", take: Any = None) -> Subject:
    return Subject(Figure("speed", "group", "title", "ratio", take, "peer", limit, sense), "")


# ---- registry -----------------------------------------------------------------------------------------------------


def test_every_figure_that_was_asked_for_is_there() -> None:
    assert set(FIRST) <= set(registry.FIGURES)
    from edgestill.quantisation import QUANTISATIONS

    shipped = {f"{form}:{q}" for form, names in QUANTISATIONS.items() for q in names}
    assert set(export.VARIANTS) <= shipped
    assert set(speed.VARIANTS) == {to for to in export.VARIANTS if not to.startswith("coreml")}
    assert registry.FIGURES["cli_startup"].limit == 0.3
    for name in ("decode_speed_ratio", "encode_speed_ratio"):
        assert (registry.FIGURES[name].limit, registry.FIGURES[name].sense) == (0.95, "at_least")


def test_names_are_groups_figures_and_variants() -> None:
    assert {s.figure.group for s in select([])} >= {"cli", "export", "decode", "encode"}
    assert [s.name for s in select(["cli"])] == ["cli_startup", "cli_startup_ratio"]
    assert len(select(["decode_speed_ratio"])) == len(speed.VARIANTS)
    assert [s.name for s in select(["decode_speed_ratio[gguf:f16]"])] == ["decode_speed_ratio[gguf:f16]"]
    twice = select(["cli", "cli_startup"])
    assert [s.name for s in twice] == ["cli_startup", "cli_startup_ratio"]


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("cli_start", "cli_startup"),
        ("decoed", "decode"),
        ("decode_speed_ratio[onnx:int5]", "decode_speed_ratio[onnx:int"),
    ],
)
def test_unknown_name_says_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        select([wrong])
    assert wrong in caught.value.message
    assert near in caught.value.hint


def test_a_figure_has_one_name() -> None:
    with pytest.raises(AssertionError, match="two figures"):
        registry.figure("cli_startup", group="cli", title="", unit="s", peer="")(lambda context, variant: Taken(1, ""))


@pytest.mark.parametrize("program", sorted(PROGRAMS.glob("*.py")), ids=lambda p: p.stem)
def test_peers_know_nothing_of_us(program: Path) -> None:
    tree = ast.parse(program.read_text())
    modules = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    ours = {name for name in modules if name.split(".")[0] in ("edgestill", "tests")}
    assert bool(ours) == program.stem.endswith("_ours")


def test_what_we_call_a_pin_is_one() -> None:
    assert all("==" in pin for pin in (*LLAMA_CPP_CONVERTER.pins, LLAMA_CPP_CONVERTER.source))
    locked = (ROOT / "constraints.txt").read_text().replace("_", "-").splitlines()
    assert LLAMA_CPP_CONVERTER.source in locked  # the converter of the very engine that we use
    assert LLAMA_CPP_CONVERTER.pins[0] in locked  # torch, so that its import costs both sides the same


# ---- judgement ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sense", "value", "interval", "holds"),
    [
        ("at_most", 0.9, None, True),
        ("at_most", 1.0, None, True),
        ("at_most", 1.1, None, False),
        ("at_most", 0.9, (0.8, 0.99), True),
        ("at_most", 0.9, (0.8, 1.01), None),
        ("at_most", 1.1, (0.99, 1.2), None),
        ("at_most", 1.1, (1.01, 1.2), False),
        ("at_least", 1.1, None, True),
        ("at_least", 0.9, None, False),
        ("at_least", 1.1, (1.01, 1.2), True),
        ("at_least", 1.1, (0.99, 1.2), None),
        ("at_least", 0.9, (0.8, 0.99), False),
    ],
)
def test_holds(sense: Any, value: float, interval: tuple[float, float] | None, holds: bool | None) -> None:
    row = judge(made(1.0, sense), Taken(value, "how", interval))
    assert row.holds is holds
    assert row.value == value
    assert ("undecided" in row.how) == (holds is None) == (row.status == "undecided")
    assert interval is None or f"{interval[0]:.4g} to {interval[1]:.4g}" in row.how


def test_doubt_excuses_a_miss_and_nothing_else() -> None:
    assert judge(made(1.0), Taken(2.0, "how", doubt="busy")).holds is None
    assert judge(made(1.0), Taken(0.5, "how", doubt="busy")).holds is True


def test_what_proves_nothing_is_not_judged() -> None:
    for value in (0.5, 2.0):
        row = judge(made(1.0), Taken(value, "how", void="a tiny model"))
        assert (row.holds, row.status) == (None, "measured")
        assert "tiny" in row.how
    assert judge(made(None), Taken(2.0, "how")).holds is None


def test_nan_does_not_hold_and_can_be_written() -> None:
    row = judge(made(None), Taken(float("nan"), "how"))
    assert (row.value, row.holds, row.status) == (None, False, "failed")
    json.dumps(row.document(), allow_nan=False)


def test_what_goes_wrong_is_a_row(context: Context) -> None:
    def missing(context: Context, variant: str) -> Taken:
        raise Unavailable("no such tool")

    def broken(context: Context, variant: str) -> Taken:
        raise EdgestillError("it broke")

    row = measure(made(1.0, take=missing), context)
    assert (row.value, row.holds, row.status) == (None, None, "unavailable")
    assert "no such tool" in row.how
    row = measure(made(None, take=broken), context)
    assert (row.value, row.holds, row.status) == (None, False, "failed")
    assert "it broke" in row.how


def test_exit_codes() -> None:
    def rows(*states: tuple[bool | None, Any]) -> list[Row]:
        return [Row("f", 1.0, "s", 1.0, holds, "", "at_most", status) for holds, status in states]

    good, informative = (True, "measured"), (None, "measured")
    undecided, missing, bad = (None, "undecided"), (None, "unavailable"), (False, "measured")
    assert exit_code(rows(good, informative)) == 0
    assert exit_code(rows(good, undecided)) == 3
    assert exit_code(rows(undecided, missing)) == 4
    assert exit_code(rows(undecided, missing, bad)) == 1


# ---- environments and processes -----------------------------------------------------------------------------------


def test_environment_that_cannot_be_made_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    nothing = Environment("nothing", ("no-such-package-of-ours==1.0",))
    with pytest.raises(Unavailable, match="no-such-package-of-ours"):
        prepare(nothing)
    assert not (tmp_path / "peers/nothing/stamp.txt").exists()
    plain = prepare(Environment("plain", ()))
    code = "import sys; print(sys.prefix != sys.base_prefix); import edgestill"
    done = subprocess.run([plain.python, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True"
    assert "No module named 'edgestill'" in done.stderr
    assert prepare(Environment("plain", ())) == plain


def test_peak_memory_is_that_of_the_process_itself(tmp_path: Path) -> None:
    """64 MiB in the script are seen; 256 MiB in this process, which a fork would inherit, are not."""
    ballast = bytearray(256 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    script = tmp_path / "script.py"
    script.write_text("import sys\nheld = b'x' * int(sys.argv[1])\n")
    small, large = (
        launch_measured(Path(sys.executable), script, [str(size)], threads=1, cwd=tmp_path)
        for size in (1, 64 << 20)
    )  # fmt: skip
    assert small.peak_bytes is not None
    assert large.peak_bytes is not None
    assert small.peak_bytes < 64 << 20
    assert large.peak_bytes - small.peak_bytes == pytest.approx(64 << 20, rel=0.05)
    assert small.cpu_seconds > 0


def test_failing_program_says_its_last_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise ValueError('no luck')\n")
    with pytest.raises(EdgestillError, match="no luck"):
        launch_measured(Path(sys.executable), script, [], threads=1, cwd=tmp_path)


# ---- for real -----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.peers", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_json_lines() -> None:
    done = run("cli", "--json", "--repeats", "1")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["figure"] for line in lines] == ["cli_startup", "cli_startup_ratio"]
    for line in lines:
        assert list(line) == KEYS
        assert line["value"] > 0
        assert "interval" in line["how"]
    assert (lines[0]["unit"], lines[0]["limit"], lines[1]["limit"]) == ("s", 0.3, None)
    assert lines[1]["holds"] is None
    assert lines[1]["value"] > 1
    assert done.returncode == {True: 0, False: 1, None: 3}[lines[0]["holds"]]


def test_list_and_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "cli_startup" in shown.err
    assert main(["enocde"]) == 2
    assert "did you mean 'encode'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["decode_speed_ratio[onnx:int4]", "encode_speed_ratio[onnx:fp32]", "decode_speed_ratio[gguf:f16]",
     "encode_speed_ratio[gguf:f16]", "export_peak_memory_bytes[onnx:int8]"],
)  # fmt: skip
def test_figures_of_models(context: Context, name: str) -> None:
    """Both sides run and agree on the output (else the row has failed); the value of a tiny model is not judged."""
    [subject] = select([name])
    row = measure(subject, context)
    assert row.status == "measured", row.how
    assert row.holds is None
    assert row.value is not None
    assert row.value > 0
    assert "2 pairs of processes" in row.how or "2 launches" in row.how
    leftovers = {path.name for path in context.scratch.iterdir()} - {"encoder", "decoder", "ours"}
    assert not leftovers


def test_a_peer_that_computes_something_else_is_no_peer(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = speed.PlainRuntime.ask

    def other(self: Any, request: Any) -> Any:
        answer = honest(self, request)
        return {**answer, "ids": [token + 1 for token in answer["ids"]]}

    monkeypatch.setattr(speed.PlainRuntime, "ask", other)
    [subject] = select(["decode_speed_ratio[onnx:fp32]"])
    row = measure(subject, context)
    assert (row.holds, row.status) == (False, "failed")
    assert "other tokens" in row.how
