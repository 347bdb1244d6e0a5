"""The parts of `bench.training`, which `--only` selects: what each measures and which metrics it derives."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from seam.bench.common import measure_machine
from seam.bench.training.step_timing import run_in_new_process, train_in_turn
from seam.bench.training.trainer_builders import BUILDERS, aligned_embeds, encoder_states
from seam.bench.training.training_setup import Setting, make_seam
from seam.modeling_seam import SeamForSpeechRecognition
from seam.train import stage1_decoding
from seam.train.recipe import DataSettings, StageRecipe

NEW_PROCESS_REPEATS = 3  # greatest number for what runs in new processes
DECODED_TOKENS = 120  # at which Stage 1 is stopped: random weights never predict EOA


@dataclass
class Findings:
    """Collect the lists of the JSON file: `rows` of metrics, times and memory of `systems`, `checks` of equal input."""

    rows: list[dict] = field(default_factory=list)
    systems: list[dict] = field(default_factory=list)
    checks: list[dict] = field(default_factory=list)

    def ratios(self, metric: str, ratios: list[float], **more):
        """Add a row with the median, the least and the greatest ratio of the repeats."""
        found = {"ratio": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}
        self.rows.append({"metric": metric, **found, **more})

    def speed(self, metric: str, seconds: list[float], baseline_seconds: list[float], **more):
        """Add a row of ratios of steps per second, repeat by repeat."""
        self.ratios(metric, [other / own for own, other in zip(seconds, baseline_seconds, strict=True)], **more)

    def system(self, part: str, name: str, seconds: list[float], **more):
        """Add the step times of a system."""
        found = {"part": part, "system": name, "seconds": statistics.median(seconds), "all_seconds": seconds}
        self.systems.append({**found, **more})


def compare_trainings(
    setting: Setting, findings: Findings, part: str, names: list[str], repeats: int
) -> dict[str, list[float]]:
    """
    Train several systems in turn and return the seconds per step of each repeat.

    Raises:
        RuntimeError: unless all were trained on the same transcripts in the same batches.
    """
    trained = train_in_turn({name: BUILDERS[name](setting) for name in names}, repeats, part)
    first, *others = names
    for name in others:
        if trained[name][-1].transcripts != trained[first][-1].transcripts:
            raise RuntimeError(f"{name} was given other batches than {first}.")
    batches = trained[first][-1].transcripts
    findings.checks.append({"part": part, "systems": names, "batches": len(batches), "same_batches": True})
    seconds = {name: [one.seconds for one in trained[name]] for name in names}
    for name in names:
        findings.system(part, name, seconds[name], tflop=trained[name][-1].operations / 1e12)
    return seconds


def stage_1(setting: Setting, findings: Findings, repeats: int):
    """
    Compare Stage 1 with the fine-tuning of a Whisper, without and with cached encoder states.

    With a cold cache the time to fill it is spread over the steps of one epoch.
    """
    cold, warm = seconds_cold_and_warm(setting, encoder_states, setting.alignment_model)
    names = ["stage_1", "whisper", "stage_1_cached", "whisper_with_table"]
    seconds = compare_trainings(setting, findings, "stage_1", names, repeats)
    findings.system("stage_1", "making the encoder's states", [cold], utterances=len(setting.utterances) + 1)
    findings.system("stage_1", "finding them on disk", [warm], utterances=len(setting.utterances) + 1)
    steps = len(setting.utterances) / setting.batch
    for baseline, suffix in (("whisper", ""), ("whisper_with_table", "_with_table")):
        findings.speed(f"stage1_vs_peer{suffix}", seconds["stage_1"], seconds[baseline])
        findings.speed(f"stage1_cached_vs_peer{suffix}", seconds["stage_1_cached"], seconds[baseline])
    with_cold = [one + cold / steps for one in seconds["stage_1_cached"]]
    findings.speed("stage1_cold_cache_vs_peer", with_cold, seconds["whisper"], steps=steps)


def seconds_cold_and_warm(setting: Setting, states: Callable, model: SeamForSpeechRecognition) -> tuple[float, float]:
    """Return the seconds that `states` takes to fill its cache, and then to find everything in it."""
    return _seconds(states, setting, model)[0], _seconds(states, setting, model)[0]


def stage_2(setting: Setting, findings: Findings, repeats: int):
    """
    Compare Stage 2 with PEFT's LoRA fine-tuning of the language model, which has neither encoder nor aligner.

    Stage 2 is measured without a cache, with cached encoder states, and with cached embeddings of the aligner.
    """
    cold, warm = seconds_cold_and_warm(setting, aligned_embeds, setting.model)
    names = ["stage_2", "peft", "stage_2_cached", "stage_2_with_states"]
    seconds = compare_trainings(setting, findings, "stage_2", names, repeats)
    findings.system("stage_2", "making the aligned embeddings", [cold], utterances=len(setting.utterances))
    findings.system("stage_2", "finding them on disk", [warm], utterances=len(setting.utterances))
    findings.speed("stage2_vs_peft", seconds["stage_2"], seconds["peft"])
    findings.speed("stage2_with_states_vs_peft", seconds["stage_2_with_states"], seconds["peft"])
    findings.speed("stage2_cached_vs_peft", seconds["stage_2_cached"], seconds["peft"])


def memory(setting: Setting, findings: Findings, repeats: int):
    """Compare the peak memory of trainings, each in a process of its own."""
    peaks = {}
    for name in ("stage_1", "stage_1_cached", "whisper", "whisper_with_table", "stage_2", "stage_2_cached", "peft"):
        peaks[name] = run_in_new_process(name, setting, setting.batch)["peak_bytes"]
        findings.systems.append({"part": "memory", "system": name, "peak_gb": peaks[name] / 1e9})
    table = 4 * setting.sizes.llm.vocab_size * setting.sizes.llm.hidden_size
    for baseline, suffix in (("whisper", ""), ("whisper_with_table", "_with_table")):
        for system, metric in (("stage_1", "stage1_memory"), ("stage_1_cached", "stage1_cached_memory")):
            ratio = peaks[system] / (peaks[baseline] + table)
            findings.ratios(f"{metric}_vs_peer{suffix}_and_table", [ratio], table_gb=table / 1e9)
    findings.ratios("stage2_memory_vs_peft", [peaks["stage_2"] / peaks["peft"]])


def processes(setting: Setting, findings: Findings, repeats: int):
    """Compare Stage 1 in two processes of one thread with one process of one and of two threads, at equal batch."""
    ways = {"1 process, 1 thread": (1, 1), "2 processes, 1 thread each": (2, 1), "1 process, 2 threads": (1, 2)}
    seconds = {name: [] for name in ways}
    for _ in range(min(repeats, NEW_PROCESS_REPEATS)):
        for name, (number, threads) in ways.items():
            found = run_in_new_process("stage_1", setting, setting.batch // number, number, threads)
            seconds[name].append(found["seconds"])
    for name in ways:
        findings.system("processes", name, seconds[name])
    one, two, threads = seconds.values()
    findings.speed("two_processes_vs_one", two, one)
    findings.speed("two_processes_vs_two_threads", two, threads)


def caches(setting: Setting, findings: Findings, repeats: int):
    """Time `seam train decode` with `DECODED_TOKENS` tokens per utterance, with an empty and with a complete cache."""
    whisper = setting.sizes.whisper
    positions, whisper.max_target_positions = whisper.max_target_positions, DECODED_TOKENS + 1
    model = make_seam(setting.sizes, setting.processor, alignment_only=True)
    whisper.max_target_positions = positions
    folder, manifest = setting.folder / "stage_1", str(setting.folder / "speech" / "manifest.jsonl")
    model.save_pretrained(folder)
    setting.processor.save_pretrained(folder)
    recipe = StageRecipe(
        training=setting.arguments(),
        data=DataSettings(train=[manifest], validation=[manifest], validation_limit=1, eval_batch_size=setting.batch),
        model=str(folder),
        alignment_cache=str(setting.folder / "decoded"),
    )
    cold, counts = _seconds(stage1_decoding.main, recipe)
    warm, counts_again = _seconds(stage1_decoding.main, recipe)
    work = {"utterances": len(setting.utterances) + 1, "tokens": DECODED_TOKENS}
    findings.system("caches", "seam train decode, cold", [cold], **work)
    findings.system("caches", "seam train decode, warm", [warm], **work)
    decoded = [one["train"]["decoded"] for one in (counts, counts_again)]
    findings.checks.append({"part": "caches", "decoded_cold": decoded[0], "decoded_warm": decoded[1]})
    findings.ratios("decode_warm_vs_cold", [warm / cold])


def utilisation(setting: Setting, findings: Findings, repeats: int):
    """Measure operations per second of each stage, relative to the product of two large matrices."""
    machine = measure_machine(torch.device(setting.device), setting.sizes.dtype)
    for name in ("stage_1", "stage_2", "stage_3"):
        (one,) = train_in_turn({name: BUILDERS[name](setting)}, 1, "utilisation")[name]
        speed = one.operations / one.seconds
        findings.system("utilisation", name, [one.seconds], tflop=one.operations / 1e12)
        findings.ratios(f"{name.replace('_', '')}_utilisation", [speed / machine.arithmetic], tflop_per_s=speed / 1e12)


def _seconds(function: Callable, *arguments) -> tuple[float, Any]:
    """Return the seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


PARTS = {part.__name__: part for part in (stage_1, stage_2, memory, processes, caches, utilisation)}
