"""The comparison with stock transformers, at a tiny size: that it runs, what it writes, and what it refuses."""

import json
import math

import pytest
import torch
import typer
from typer.testing import CliRunner

from seam.bench import common
from seam.bench.inference import __main__ as inference
from seam.bench.inference import decoding_measurements

pytestmark = pytest.mark.medium

# That every batch size must have.
METRICS = {"stage1_vs_whisper", "llm_vs_plain", "seam_vs_whisper", "seam_draft_vs_whisper", "lookup_share"}


def run(*arguments: str):
    app = typer.Typer()
    app.command()(inference.main)
    return CliRunner().invoke(app, [*arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With `loops.json` and `loops.png` of two batch sizes, all parts."""
    folder = tmp_path_factory.mktemp("inference")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(decoding_measurements, "CALLS", 12)
        monkeypatch.setattr(decoding_measurements, "WARM_UP_CALLS", 4)
        monkeypatch.setattr(common, "BYTES", 2**20)
        monkeypatch.setattr(common, "SIDE", 64)
        files = f"--json {folder / 'loops.json'} --plot {folder / 'loops.png'}"
        result = run(*f"--size tiny --batch 1,3 --tokens 25 --repeats 2 --active 200 {files}".split())
    assert result.exit_code == 0, result.output
    assert "stage1_vs_whisper" in result.output and "wrote what the plain one did" in result.output
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "loops.json").read_text())


def found(report, batch: int, metric: str) -> dict:
    (row,) = (row for row in report["rows"] if (row["batch"], row["metric"]) == (batch, metric))
    return row


def test_rows_hold_every_metric_of_every_batch(report):
    assert all(row.keys() >= {"batch", "metric", "ratio"} for row in report["rows"])
    assert all(math.isfinite(row["ratio"]) and row["ratio"] > 0 for row in report["rows"])
    for batch in (1, 3):
        metrics = {row["metric"] for row in report["rows"] if row["batch"] == batch}
        assert metrics >= METRICS | {"stage1_active_vs_whisper", "lookup_share_active", "memory_12_calls"}
        assert {f"llm_vs_plain_agreement_{share}" for share in (50, 80, 90, 94, 96, 98, 100)} <= metrics
        assert sum(row["metric"] == "linearity" and row["batch"] == batch for row in report["rows"]) == 4


def test_the_run_is_described(report):
    assert (report["size"], report["device"], report["dtype"], report["tokens"]) == ("tiny", "cpu", "float32", 25)
    assert report["torch"] == torch.__version__ and report["threads"] == torch.get_num_threads()
    assert report["hardware"]["cpu"] and report["hardware"]["cores"] > 0 and report["hardware"]["gpu"] is None


def test_every_fast_loop_wrote_what_the_plain_one_did(report):
    # Stage 1 with an active vocabulary and with drafts, and the LLM; and the LLM with drafts of every quality.
    assert len(report["checks"]) == 2 * (3 + 7)
    assert all(check["differing"] == 0 and check["rows"] > 0 for check in report["checks"])


def test_ratios_are_those_of_the_seconds(report):
    seconds = {
        (one["batch"], one["system"]): one["all_seconds"] for one in report["systems"] if one["part"] == "ratios"
    }

    def of_both_repeats(batch, *systems):
        return sum(sum(seconds[batch, system]) for system in systems) / 2  # two repeats: the median is the mean

    whole = of_both_repeats(3, "encoder", "stage_1", "llm_checked") / of_both_repeats(3, "encoder", "whisper_decoder")
    assert found(report, 3, "seam_vs_whisper")["ratio"] == pytest.approx(whole)
    stage_1 = of_both_repeats(1, "stage_1") / of_both_repeats(1, "whisper_decoder")
    assert found(report, 1, "stage1_vs_whisper")["ratio"] == pytest.approx(stage_1)


def test_a_perfect_draft_is_one_forward(report):
    counts = {one["system"]: one for one in report["systems"] if one["part"] == "agreement" and one["batch"] == 1}
    perfect = counts["llm_checked_100%"]
    assert (perfect["forwards"], perfect["accepted"], perfect["rejected"]) == (1, 24, 0)
    assert counts["llm_checked_80%"]["forwards"] > 1 and counts["llm_checked_80%"]["rejected"] > 0
    assert perfect["rtfx"] == pytest.approx(2 / perfect["seconds"])  # a window of 2 s


def test_the_profile_has_what_comes_before_and_after(report):
    loops = {one["loop"]: one["components"] for one in report["profile"] if one["batch"] == 1}
    for name in ("Stage 1, stock (before)", "Stage 1 (after)"):
        assert all(loops[name][part] > 0 for part in ("lookup", "decoder layers", "rest: projections, cache, Python"))
    assert loops["LLM, checked (after)"]["LLM forwards"] > 0
    assert 0 < found(report, 1, "lookup_share")["ratio"] < 1


def test_the_plot_is_a_picture(folder):
    assert (folder / "loops.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--size large", "tiny, small, paper"),
        ("--device tpu", "cpu, cuda"),
        ("--batch 1,0", "above 0"),
        ("--batch one", "above 0"),
        ("--only speed", "ratios"),
        ("--tokens 200", "447"),
        ("--size tiny --only ratios --active 20", "more than the 90"),
        pytest.param(
            "--device cuda", "no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
    ],
)
def test_bad_arguments_are_named_before_anything_is_built(monkeypatch, arguments, named):
    monkeypatch.setattr(inference, "build", None)
    result = run(*arguments.split())
    assert result.exit_code == 2
    assert named in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("part", "metrics"),
    [
        ("llm", {"llm_vs_plain"}),
        (
            "stage_1",
            {"stage1_vs_whisper", "stage1_draft_vs_plain", "whisper_decoder_vs_roofline", "stage1_vs_roofline"},
        ),
    ],
)
def test_a_part_by_itself(part, metrics, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "BYTES", 2**20)
    monkeypatch.setattr(common, "SIDE", 64)
    result = run(*f"--size tiny --batch 2 --tokens 8 --repeats 1 --only {part} --json {tmp_path / 'part.json'}".split())
    assert result.exit_code == 0, result.output
    assert {row["metric"] for row in json.loads((tmp_path / "part.json").read_text())["rows"]} == metrics
