"""Building: what is compiled once, what for each level, what an interruption leaves, what goes wrong.

The compiler is a script here that copies its input; ``test_runner.py`` has the real one.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgestill.errors import EdgestillError, MissingDependency, UsageError
from edgestill.runtimes.native import LEVELS, RUNNER_NAME, build, find_runner, source
from edgestill.runtimes.native.source import ENGINE, Unit
from edgestill.runtimes.native.zig import Zig

# Writes its arguments and its input to the output, and fails on a file that says so. A line a call goes to calls.
ZIG = """#!{python}
import os, sys
from pathlib import Path
if sys.argv[1] == "version":
    print("0.0.1")
    sys.exit()
inputs = [word for word in sys.argv[2:] if word.endswith((".c", ".cpp", ".o")) and word != sys.argv[-1]]
text = "".join(Path(word).read_text(errors="replace") for word in inputs)
with open({calls!r}, "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if "broken" in text and sys.argv[1] != "version" and not os.path.exists({mended!r}):
    print("src/b.cpp:1:1: error: expected unqualified-id\\nnote: more\\n1 error generated.", file=sys.stderr)
    sys.exit(1)
Path(sys.argv[-1]).write_text(" ".join(sys.argv[2:-2]) + text)
"""
UNITS = (
    Unit(("a.c",), ()),
    Unit(("b.cpp",), ()),
    Unit(("m/x.cpp", "m/y.cpp"), ()),
    Unit(("k.c",), ("-DK",), tuned=True),
)


class Bench:
    """A tiny engine, a compiler that notes its calls, a cache."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.calls_file, self.mended = folder / "cache", folder / "calls", folder / "mended"
        self.engine = folder / "engine"
        for name in ("a.c", "b.cpp", "m/x.cpp", "m/y.cpp", "k.c"):
            (self.engine / name).parent.mkdir(parents=True, exist_ok=True)
            (self.engine / name).write_text(f"// {name}\n")
        self.zig = folder / "zig"
        self.zig.write_text(ZIG.format(python=sys.executable, calls=str(self.calls_file), mended=str(self.mended)))
        self.zig.chmod(0o755)

    def calls(self) -> list[str]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return lines

    def build(self, level: str = "all") -> tuple[build.BuiltRunner, ...]:
        return build.build_runner("aarch64", level, cache=self.cache)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path)
    monkeypatch.setattr(build, "find_zig", lambda: Zig(made.zig, "0.0.1"))
    monkeypatch.setattr(build, "engine_source", lambda **_: made.engine)
    monkeypatch.setattr(build, "units", lambda source, target: UNITS)
    return made


def test_a_second_level_compiles_only_what_its_instructions_change(bench: Bench) -> None:
    low, high, top = bench.build()
    assert [one.level for one in (low, high, top)] == ["armv8.0", "dotprod", "i8mm"]
    assert [(one.compiled, one.reused) for one in (low, high, top)] == [(4, 0), (1, 3), (1, 3)]
    compiled = [line for line in bench.calls() if " -c " in line]
    assert len(compiled) == 6
    tuned = [line for line in compiled if "-DK" in line]
    assert [re.search(r"-mcpu=(\S+)", line)[1] for line in tuned] == [LEVELS[one.level].cpu for one in (low, high, top)]
    assert all("-mcpu=generic " in line for line in compiled if "-DK" not in line)
    assert find_runner("aarch64", {"cpu_flags": ["asimddp", "asimdhp"]}, cache=bench.cache) == high.path
    assert low.path.stat().st_mode & 0o111
    assert len({one.sha256 for one in (low, high, top)}) == 3


def test_what_was_built_is_not_built_again_until_it_is_damaged(bench: Bench) -> None:
    [first] = bench.build("dotprod")
    bench.calls()
    [again] = bench.build("dotprod")
    assert (again.compiled, again.reused, again.sha256) == (0, 0, first.sha256)
    assert bench.calls() == []
    first.path.write_bytes(b"cut")
    [mended] = bench.build("dotprod")
    assert (mended.compiled, mended.reused, mended.sha256) == (0, 4, first.sha256)
    assert len(bench.calls()) == 1  # linked again


def test_a_file_that_does_not_compile_is_one_line_and_the_rest_is_kept(bench: Bench) -> None:
    (bench.engine / "k.c").write_text("broken")
    with pytest.raises(EdgestillError, match=r"can't build k\.c for armv8\.0: src/b\.cpp:1:1: error: expected"):
        bench.build()
    kept = len(list((bench.cache / "runner" / "objects").glob("*.o")))
    assert kept == 3
    assert not list((bench.cache / "runner").rglob("*.tmp.o"))
    assert not list((bench.cache / "runner").rglob(RUNNER_NAME))
    bench.calls()
    left = bench.cache / "runner" / "objects" / "0.123.tmp.o"  # of a process that was killed
    left.touch()
    bench.mended.touch()
    assert (bench.build("armv8.0")[0].compiled, len(bench.calls())) == (1, 2)  # where it was
    assert not left.exists()


def test_files_compiled_as_one_are_named_relative_to_the_engine(bench: Bench) -> None:
    [built] = bench.build("armv8.0")
    assert '#include "m/x.cpp"\n#include "m/y.cpp"\n' in built.path.read_text()


def test_copies_say_what_they_are(bench: Bench, tmp_path: Path) -> None:
    copies = build.copy_runners(bench.build(), tmp_path / "out")
    assert [path.name for path in copies] == [
        f"{RUNNER_NAME}-aarch64-{name}" for name in ("armv8.0", "dotprod", "i8mm")
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in copies)


def test_what_it_is_not_built_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no level 'dotprot' for aarch64") as caught:
        build.build_runner("aarch64", "dotprot", cache=tmp_path)
    assert "'dotprod'" in caught.value.hint
    with pytest.raises(UsageError, match="not built for 'riscv64'"):
        build.build_runner("riscv64", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="ziglang is not installed") as caught:
        build.build_runner("aarch64", cache=tmp_path)
    assert caught.value.hint == "pip install 'edgestill[runner]'"


def test_a_cache_that_cannot_be_written(tmp_path: Path, bench: Bench) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can't be written"):
        build.build_runner("aarch64", cache=tmp_path / "file")


def test_the_engine_is_the_one_that_the_environment_pins() -> None:
    """One version for the Python worker, the runner and the peers; a new pin needs a new checksum here."""
    pins = (Path(__file__).parents[3] / "constraints.txt").read_text()
    assert f"llama_cpp_python=={ENGINE.version}\n" in pins
    llama_cpp = pytest.importorskip("llama_cpp")
    assert llama_cpp.__version__ == ENGINE.version
    script = "import llama_cpp.llama_cpp as api; print(api.llama_version().decode())"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert told == ENGINE.llama


def test_every_own_file_decides_the_name_of_the_binary() -> None:
    names = {path.name for path in source.own_sources()}
    assert {"runner.cpp", "engine.cpp", "host.c", "wire.h"} <= names
    assert len(source.runner_id()) == 64


@pytest.mark.slow
def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    """Our own part of the runner compiled twice, from caches at different places, with the real compiler."""
    made = []
    engine = None
    for name in ("one", "another place"):
        try:
            zig = build.find_zig()
            engine = engine or source.engine_source()
        except EdgestillError as error:
            pytest.skip(error.message)
        builder = build._Builder(tmp_path / name, engine, LEVELS["dotprod"], zig, 1, lambda *_: None)
        builder._objects.mkdir(parents=True)
        builder._write_versions()
        chosen = [one for one in source.units(engine, "aarch64") if one.sources[0] in ("exchange.cpp", "src/llama.cpp")]
        assert len(chosen) == 2
        objects = [builder._object(one) for one in chosen]
        builder._compile_all(list(zip(chosen, objects, strict=True)))
        made.append([path.read_bytes() for path in objects])
    assert made[0] == made[1]
