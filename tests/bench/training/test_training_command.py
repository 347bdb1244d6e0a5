"""The comparison with transformers' and PEFT's trainings, at a tiny size: that it runs, what it writes and refuses."""

import json
import math
import statistics

import pytest
import torch
import typer
from typer.testing import CliRunner

from seam.bench.training import __main__ as training

pytestmark = pytest.mark.medium

STAGE_1 = {"stage1_vs_peer", "stage1_cached_vs_peer", "stage1_cold_cache_vs_peer"}
STAGE_1 |= {"stage1_vs_peer_with_table", "stage1_cached_vs_peer_with_table"}
STAGE_2 = {"stage2_vs_peft", "stage2_with_states_vs_peft", "stage2_cached_vs_peft"}


def run(*arguments: str):
    app = typer.Typer()
    app.command()(training.main)
    return CliRunner().invoke(app, [*arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With `steps.json` and `steps.png` of what needs no process of its own."""
    folder = tmp_path_factory.mktemp("training")
    files = f"--json {folder / 'steps.json'} --plot {folder / 'steps.png'}"
    result = run(*f"--size tiny --batch 2 --steps 3 --repeats 2 --only stage_1,stage_2,caches {files}".split())
    assert result.exit_code == 0, result.output
    assert "stage1_vs_peer" in result.output and "at least 0.95" in result.output
    assert "Not measured: memory, processes, utilisation" in result.output
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "steps.json").read_text())


def test_rows_hold_every_metric(report):
    assert {row["metric"] for row in report["rows"]} == STAGE_1 | STAGE_2 | {"decode_warm_vs_cold"}
    for row in report["rows"]:
        assert 0 < row["least"] <= row["ratio"] <= row["greatest"] < math.inf


def test_the_run_is_described(report):
    keys = ("size", "device", "dtype", "batch", "steps", "repeats")
    assert [report[key] for key in keys] == ["tiny", "cpu", "float32", 2, 3, 2]
    assert report["torch"] == torch.__version__ and report["hardware"]["cores"] > 0
    assert 0 < report["seconds_of_speech"] <= 2 and report["tokens"] > 1
    assert report["skipped"] == ["memory", "processes", "utilisation"]


def test_both_sides_were_given_the_same_batches(report):
    checks = {check["part"]: check for check in report["checks"]}
    assert checks["stage_1"]["systems"] == ["stage_1", "whisper", "stage_1_cached", "whisper_with_table"]
    assert checks["stage_2"]["systems"] == ["stage_2", "peft", "stage_2_cached", "stage_2_with_states"]
    assert all(checks[part]["same_batches"] and checks[part]["batches"] == 3 for part in ("stage_1", "stage_2"))


def test_ratios_are_those_of_the_seconds(report):
    seconds = {one["system"]: one["all_seconds"] for one in report["systems"]}
    found = {row["metric"]: row["ratio"] for row in report["rows"]}

    def ratio(own, other):
        return statistics.mean(b / a for a, b in zip(seconds[own], seconds[other], strict=True))  # of two: the median

    assert found["stage1_vs_peer"] == pytest.approx(ratio("stage_1", "whisper"))
    assert found["stage2_cached_vs_peft"] == pytest.approx(ratio("stage_2_cached", "peft"))
    (cold,) = seconds["making the encoder's states"]
    cached = [one + cold / 3 for one in seconds["stage_1_cached"]]
    with_cold = statistics.mean(b / a for a, b in zip(cached, seconds["whisper"], strict=True))
    assert found["stage1_cold_cache_vs_peer"] == pytest.approx(with_cold)


def test_nothing_is_decoded_twice(report):
    (check,) = (check for check in report["checks"] if check["part"] == "caches")
    assert (check["decoded_cold"], check["decoded_warm"]) == (6, 0)


def test_what_is_cached_is_not_computed(report):
    tflop = {one["system"]: one.get("tflop") for one in report["systems"]}
    # The encoder, of two layers over 2 x 100 states of 64 dimensions, is 2 x (4 + 2 x 2) matrices of 64 x 64; and more.
    layers = 2 * (2 * 100) * 2 * (4 + 2 * 2) * 64 * 64 / 1e12
    for stage, cached in (("stage_1", "stage_1_cached"), ("stage_2", "stage_2_with_states")):
        assert layers < tflop[stage] - tflop[cached] < 3 * layers
    assert tflop["stage_2_cached"] < tflop["stage_2_with_states"]
    assert tflop["whisper"] < tflop["whisper_with_table"]


def test_the_plot_is_a_picture(folder):
    assert (folder / "steps.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_runs_in_processes_of_its_own(tmp_path):
    result = run(
        *"--size tiny --batch 2 --steps 3 --repeats 1 --only memory,processes,utilisation".split(),
        *("--json", str(tmp_path / "steps.json")),
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "steps.json").read_text())
    found = {row["metric"]: row for row in report["rows"]}
    assert found.keys() >= {"two_processes_vs_one", "two_processes_vs_two_threads", "stage2_memory_vs_peft"}
    assert found["stage1_memory_vs_peer_and_table"]["table_gb"] == pytest.approx(4 * 1024 * 128 / 1e9)
    assert all(found[f"stage{number}_utilisation"]["ratio"] > 0 for number in (1, 2, 3))
    peaks = [one["peak_gb"] for one in report["systems"] if one["part"] == "memory"]
    assert len(peaks) == 7 and all(peak > 0.1 for peak in peaks)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--size large", "tiny, base, small, paper"),
        ("--device tpu", "cpu, cuda"),
        ("--batch 3", "even numbers"),
        ("--only speed", "stage_1, stage_2"),
        pytest.param(
            "--device cuda", "no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(monkeypatch, arguments, named):
    monkeypatch.setattr(training, "write_speech", None)
    result = run(*arguments.split())
    assert result.exit_code == 2
    assert named in " ".join(result.output.replace("│", " ").split())
