"""A model in a given number of bytes: tiny models, the real runtime, sizes to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.artifact import Artifact
from edgestill.bench.reference import make_reference
from edgestill.bench.verify import VerifyOptions, verify
from edgestill.checkpoints import open_model
from edgestill.errors import UsageError
from edgestill.export import export
from edgestill.export.source import Source
from edgestill.grids import dequantise
from edgestill.recipe import ExportConfig
from edgestill.runtimes.gguf_file import GgufFile
from edgestill.runtimes.transports.local import LocalWorker

pytest.importorskip("llama_cpp")

Texts = tuple[list[str], list[str], list[str]]


@pytest.fixture(scope="module")
def texts(sentences: list[str]) -> Texts:
    joined = [" ".join(sentences[at : at + 5]) for at in range(0, 200, 5)]
    return joined[:20], joined[20:30], joined[30:]


def _budget(model: Path, out: Path, to: str, texts: Texts, **changes: Any) -> Artifact:
    return export(model, out, ExportConfig(to=to), calibration=texts[0], dev=texts[1], **changes)


def _kl(artifact: Artifact, model: Path, texts: Texts, work: Path) -> float:
    reference = make_reference(model, work, texts=texts[2], window=64, limit=600, threads=1)
    with LocalWorker(artifact.path) as worker:
        return float(np.mean(worker.score(reference, 4)["kl"]))


@pytest.fixture(scope="module")
def sizes(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    root = tmp_path_factory.mktemp("plain")
    return {
        q: export(tiny_llama, root / q, ExportConfig(to=f"gguf:{q}")).model_bytes for q in ("iq4_nl", "q8_0", "f16")
    }


@pytest.mark.whole
@pytest.mark.parametrize("share", [0.15, 0.5, 0.9])
def test_the_file_fits_and_is_close(
    share: float, tiny_llama: Path, sizes: dict[str, int], texts: Texts, tmp_path: Path
) -> None:
    size = int(sizes["iq4_nl"] + share * (sizes["q8_0"] - sizes["iq4_nl"]))
    artifact = _budget(tiny_llama, tmp_path / "out", f"gguf@{size / 1e6:.6f}MB", texts)
    assert 0.97 * size <= artifact.model_bytes <= size
    assert artifact.manifest.quantisation.endswith(("MB", "MiB"))
    assert "budget" in artifact.manifest.contents
    assert len([name for name in artifact.manifest.dtype_histogram if name not in ("f32", "f16")]) > 1


@pytest.mark.whole
def test_a_budgeted_artifact_passes_verification(
    tiny_llama: Path, sizes: dict[str, int], texts: Texts, tmp_path: Path
) -> None:
    artifact = _budget(tiny_llama, tmp_path / "out", f"gguf@{sizes['q8_0'] * 0.75 / 1e6:.6f}MB", texts)
    reference = make_reference(tiny_llama, tmp_path / "reference", texts=texts[2], window=64, limit=400, threads=1)
    verdict = verify(
        artifact.path, student=tiny_llama, references={"held-out": reference}, work=tmp_path / "work",
        options=VerifyOptions(threads=1),
    )  # fmt: skip
    assert verdict.passed, [check for check in verdict.checks if not check.passed]


@pytest.mark.whole
def test_more_bytes_lose_less_and_llama_cpps_own_rounding_loses_more(
    tiny_llama: Path, sizes: dict[str, int], texts: Texts, tmp_path: Path
) -> None:
    """At the very size of a plain file type, in the runtime, on text that no choice has seen."""
    work = tmp_path / "reference"
    small = _budget(tiny_llama, tmp_path / "small", f"gguf@{sizes['iq4_nl'] / 1e6:.6f}MB", texts)
    large = _budget(tiny_llama, tmp_path / "large", f"gguf@{sizes['q8_0'] / 1e6:.6f}MB", texts)
    plain = export(tiny_llama, tmp_path / "plain", ExportConfig(to="gguf:iq4_nl"))
    losses = [_kl(artifact, tiny_llama, texts, work) for artifact in (large, small, plain)]
    assert losses == sorted(losses)
    assert losses[1] < 0.8 * losses[2]


@pytest.mark.whole
def test_sensitivities_are_kept_and_used_again(
    tiny_llama: Path, sizes: dict[str, int], texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, work = int(sizes["q8_0"] * 0.8), tmp_path / "work"
    first = _budget(tiny_llama, tmp_path / "a", f"gguf@{size / 1e6:.6f}MB", texts, work=work)
    [file] = work.glob("sensitivities-*.json")
    kept = json.loads(file.read_text())
    assert kept["model_id"] == open_model(tiny_llama).model_id
    costs = kept["tensors"]["model.layers.0.mlp.down_proj.weight"]
    assert costs["q8_0"]["size_bytes"] == 64 * 128 // 32 * 34
    assert costs["iq4_nl"]["loss"] > costs["q5_0"]["loss"] > costs["q8_0"]["loss"] > 0
    assert {cost["how"] for each in kept["tensors"].values() for cost in each.values()} == {"measured"}

    from edgestill.export import sensitivity

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(sensitivity, "measure", never)
    again = _budget(tiny_llama, tmp_path / "b", f"gguf@{size / 1e6:.6f}MB", texts, work=work)
    assert again.manifest.artifact_id == first.manifest.artifact_id
    with pytest.raises(AssertionError, match="measured again"):  # of other text
        export(tiny_llama, tmp_path / "c", ExportConfig(to=f"gguf@{size / 1e6:.6f}MB"), calibration=texts[1],
               dev=texts[0], work=work)  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("most", [(0.0, 1e30), (0.0, 0.0)])
def test_cheaper_measures_rank_like_the_full_one(
    most: tuple[float, float], tiny_llama: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgestill.export import sensitivity

    full = _measured(tiny_llama, texts)
    monkeypatch.setattr(sensitivity, "_ALL", most[0])
    monkeypatch.setattr(sensitivity, "_EACH", most[1])
    cheap = _measured(tiny_llama, texts)
    pairs = [(full[n][t].loss, cheap[n][t].loss) for n in full for t in full[n] if full[n][t].loss > 1e-9]
    logs = np.log(np.maximum(np.array(pairs), 1e-12))
    assert np.corrcoef(logs.T)[0, 1] > 0.9
    hows = {cost.how for each in cheap.values() for cost in each.values()}
    assert hows == ({"measured", "derived"} if most[1] else {"measured", "shared"})


def _measured(model: Path, texts: Texts) -> Any:
    from edgestill.export.allocate_gguf import GgufSpace
    from edgestill.export.sensitivity import measure, ruler_of

    source = Source(open_model(model))
    moments = source.moments(texts[0], 512, 8)
    space = GgufSpace(source, ExportConfig(to="gguf@1MB"))
    space.learn(moments)
    return measure(space, ruler_of(source, texts[0], 512, 8), moments)


def test_replaying_layers_changes_nothing(tiny_llama: Path, texts: Texts) -> None:
    from edgestill.export.sensitivity import ruler_of

    ruler = ruler_of(Source(open_model(tiny_llama)), texts[0], 256, 8)
    name = "model.layers.2.mlp.up_proj.weight"
    changed = ruler.parameters[name].detach().numpy() * np.float32(1.1)
    quick = ruler.distance({name: changed})
    embedding = "model.embed_tokens.weight"
    same = ruler.parameters[embedding].detach().numpy().copy()
    assert ruler.distance({name: changed, embedding: same}) == pytest.approx(quick, rel=1e-9)
    assert quick > 1e-6
    assert ruler.distance({}) == pytest.approx(0, abs=1e-12)


@pytest.mark.whole
def test_an_encoder_and_a_classifier_have_budgets_too(
    tiny_bert: Path, tiny_classifier: Path, tiny_gpt2: Path, sentences: list[str], tmp_path: Path
) -> None:
    """GPT-2's matrices lie the other way round in its folder."""
    sentences = [" ".join(sentences[at : at + 3]) for at in range(0, 180, 3)]
    for model in (tiny_bert, tiny_classifier, tiny_gpt2):
        top = export(model, tmp_path / f"{model.name}-q8", ExportConfig(to="gguf:q8_0")).model_bytes
        size = int(top * 0.97)
        artifact = export(
            model, tmp_path / model.name, ExportConfig(to=f"gguf@{size / 1e6:.6f}MB"), calibration=sentences[:40],
            dev=sentences[40:60],
        )  # fmt: skip
        assert artifact.model_bytes <= size
        assert artifact.model_bytes >= 0.97 * size


@pytest.mark.whole
def test_too_small_says_what_is_possible_and_too_large_takes_the_best(
    tiny_llama: Path, sizes: dict[str, int], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"gguf@0\.01MB is too small: with the smallest types this model takes \d"):
        export(tiny_llama, tmp_path / "small", ExportConfig(to="gguf@0.01MB"))
    assert not (tmp_path / "small").exists()
    best = export(tiny_llama, tmp_path / "large", ExportConfig(to="gguf@1GB"))
    assert best.model_bytes == sizes["f16"]
    assert "larger than the best types need" in best.manifest.contents
    assert "built-in sentences" in best.manifest.contents


def test_types_beside_a_budget_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="chooses the types itself"):
        export(tiny_llama, tmp_path / "both", ExportConfig(to="gguf@60MB"), types={"a": "q8_0"})


def test_types_of_ones_own(tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    artifact = export(tiny_llama, tmp_path / "own", ExportConfig(to="gguf:q4_0"), types={name: "q8_0"})
    with GgufFile(artifact.entry) as file:
        assert file.tensors["blk.1.ffn_up.weight"].grid == "q8_0"
        assert dequantise("q8_0", file.raw("blk.1.ffn_up.weight"), (128, 64)).shape == (128, 64)
