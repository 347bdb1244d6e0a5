"""
The parts of `bench.inference`, which `--only` selects: what each measures and which ratios it derives.

Each part is a function of a `Setting`, and adds what it finds to the `Findings`.
"""

import math
import statistics
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from functools import partial
from unittest.mock import patch

import torch
from tqdm.auto import tqdm
from transformers import WhisperForConditionalGeneration

from seam.bench.common import Machine, Measurement, measure_in_turn, median_of_sums, memory_in_use
from seam.bench.inference.decoding_loops import Output, Speech, Utterances
from seam.bench.inference.profiling import (
    Roofline,
    llm_components,
    lookup_share,
    stage_1_components,
    stock_components,
    time_components,
)
from seam.modeling_seam import SeamForSpeechRecognition
from seam.modeling_seam.nearest import NearestToken

AGREEMENT = 0.96  # of drafts, unless a curve over several is measured
CURVE = (0.5, 0.8, 0.9, 0.94, 0.96, 0.98, 1.0)
LENGTHS = (1, 2, 4)  # multiples of the number of tokens, for the linearity
WARM_UP_TOKENS = 3
PROFILED_TOKENS = 20  # of loops that do the same in every step
CALLS, WARM_UP_CALLS, CALL_TOKENS = 500, 50, 12  # of `generate`, for the memory

# Steps between bf16 numbers up to which two logits are a tie: a forward over many positions rounds differently than one
# over a single position.
TIE = 4


@dataclass
class Comparison:
    """
    Hold how the output of a fast loop differs from that of the plain one.

    Args:
        rows: number of rows compared.
        differing: number of rows that differ.
        ties: number of rows whose first difference is a numerical tie.
        gaps: per differing row, the distance at its first difference between the plain loop's logits of both tokens, in
            steps between bf16 numbers of their size.
    """

    rows: int
    differing: int
    ties: int
    gaps: list[float]

    @property
    def is_lossless(self) -> bool:
        """Return whether all rows that differ are ties."""
        return self.differing == self.ties

    def to_dict(self) -> dict:
        """Return the fields, for the JSON file."""
        return asdict(self)


def compare(
    fast: list[list[int]], plain: list[list[int]], dtype: torch.dtype, logits_of: Callable[[int], torch.Tensor]
) -> Comparison:
    """
    Compare the output of two loops.

    Args:
        fast: ids of each row, batch after batch.
        plain: those of the plain loop.
        dtype: of the weights. In fp32 nothing counts as a tie.
        logits_of: returns the plain loop's logits `(batch, vocabulary)` at a position; called only where rows differ.
    """
    gaps = []
    for row, (one, other) in enumerate(zip(fast, plain, strict=True)):
        if one == other:
            continue
        position = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
        if position is None:  # one is a prefix of the other
            gaps.append(math.inf)
        else:
            logits = logits_of(position)
            logits = logits[row % len(logits)].float()
            gaps.append(in_bf16_steps(float(logits[one[position]]), float(logits[other[position]])))
    ties = sum(gap <= TIE for gap in gaps) if dtype == torch.bfloat16 else 0
    return Comparison(len(plain), len(gaps), ties, gaps)


def in_bf16_steps(a: float, b: float) -> float:
    """Return the distance of two numbers in steps between bf16 numbers of the size of the larger one."""
    largest = max(abs(a), abs(b))
    if largest == 0:
        return 0.0
    return abs(a - b) / (torch.finfo(torch.bfloat16).eps * 2.0 ** math.floor(math.log2(largest)))


@dataclass
class Setting:
    """
    Hold what all measurements of a batch size share.

    Args:
        model: see `synthetic_model.build`.
        whisper: see `synthetic_model.stock_whisper`.
        lookup: see `synthetic_model.lookup`.
        machine: its speed.
        speech: the batch that is transcribed.
        tokens: number of tokens that each loop decodes.
        repeats: of each measurement.
        active: a lookup in an active vocabulary, which is measured, too.
    """

    model: SeamForSpeechRecognition
    whisper: WhisperForConditionalGeneration
    lookup: NearestToken
    machine: Machine
    speech: Speech
    tokens: int
    repeats: int
    active: NearestToken | None = None

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return self.model.device

    @property
    def batch_size(self) -> int:
        """Return the number of utterances decoded at once."""
        return len(self.speech.features)

    def utterances(self, tokens: int) -> Utterances:
        """Return utterances of so many tokens each."""
        return Utterances(self.model, self.whisper, self.lookup, self.speech, tokens)

    def measure(self, systems: dict[str, Callable], repeats: int, part: str) -> dict[str, Measurement]:
        """Measure systems in turn."""
        return measure_in_turn(systems, repeats, self.device, f"batch {self.batch_size}, {part}")


@dataclass
class Findings:
    """Collect the lists of the JSON file: `rows` of ratios, times of `systems`, `checks` of output, and `profile`."""

    rows: list[dict] = field(default_factory=list)
    systems: list[dict] = field(default_factory=list)
    checks: list[dict] = field(default_factory=list)
    profile: list[dict] = field(default_factory=list)

    def ratio(self, setting: Setting, metric: str, ratio: float, **more):
        """Add a row with the ratio of a metric."""
        self.rows.append({"batch": setting.batch_size, "metric": metric, "ratio": ratio, **more})

    def times(self, setting: Setting, part: str, measured: dict[str, Measurement], utterances: Utterances):
        """Add time, RTFx and memory of each system, and of loops with drafts the mean counts of rows and repeats."""
        for name, one in measured.items():
            found = {
                "batch": setting.batch_size,
                "part": part,
                "system": name,
                "seconds": one.median,
                "all_seconds": one.seconds,
                "rtfx": setting.batch_size * setting.speech.seconds / one.median,
                "peak_gb": one.peak / 1e9,
            }
            if isinstance(one.results[0], Output):
                found["seconds_per_token"] = one.median / utterances.tokens
                of_repeats = [result.rows for result in one.results if result.rows is not None]
                if of_repeats:
                    found["forwards_of_the_batch"] = statistics.mean(
                        max(row.forwards for row in rows) for rows in of_repeats
                    )
                    for count in ("forwards", "accepted", "rejected"):
                        found[count] = statistics.mean(getattr(row, count) for rows in of_repeats for row in rows)
            self.systems.append(found)

    def check(self, setting: Setting, utterances: Utterances, fast: str, measured: dict[str, Measurement], plain: str):
        """Add a comparison of the output of two loops."""
        logits_of = utterances.llm_logits if plain == "llm" else utterances.stage_1_logits
        both = ([row for result in measured[name].results for row in result.tokens] for name in (fast, plain))
        comparison = compare(*both, setting.model.dtype, logits_of)
        self.checks.append({"batch": setting.batch_size, "fast": fast, "plain": plain, **comparison.to_dict()})


def ratios(setting: Setting, findings: Findings, only: Collection[str] | None = None):
    """
    Time each loop in turn; derive ratios of loops and of complete systems, which are sums of loops, and of rooflines.

    Args:
        setting: of the run.
        findings: to which ratios, times and checks are added.
        only: names of the systems that are measured; all by default.
    """
    warm, utterances = setting.utterances(WARM_UP_TOKENS), setting.utterances(setting.tokens)
    setting.measure(_systems(setting, warm, only), 1, "warm-up")
    measured = setting.measure(_systems(setting, utterances, only), setting.repeats, "ratios")
    findings.times(setting, "ratios", measured, utterances)
    for fast, plain in (("stage_1_active", "stage_1"), ("stage_1_checked", "stage_1"), ("llm_checked", "llm")):
        if fast in measured:
            findings.check(setting, utterances, fast, measured, plain)

    def ratio(metric: str, systems: str, against: str, **more):
        """Add the ratio of two sums of systems, whose names are separated by spaces."""
        if not measured.keys() >= {*systems.split(), *against.split()}:
            return
        seconds, against_seconds = (median_of_sums(measured, names.split()) for names in (systems, against))
        findings.ratio(
            setting, metric, seconds / against_seconds, seconds=seconds, against_seconds=against_seconds, **more
        )

    drafted, whisper = {"agreement": AGREEMENT}, "encoder whisper_decoder"
    ratio("stage1_vs_whisper", "stage_1", "whisper_decoder")
    ratio("stage1_active_vs_whisper", "stage_1_active", "whisper_decoder")
    ratio("stage1_draft_vs_plain", "draft_head stage_1_checked", "stage_1", **drafted)
    ratio("llm_vs_plain", "llm_checked", "llm", **drafted)
    ratio("seam_plain_loops_vs_whisper", "encoder stage_1 llm", whisper)
    ratio("seam_vs_whisper", "encoder stage_1 llm_checked", whisper, **drafted)
    ratio("seam_vs_whisper_decoding", "stage_1 llm_checked", "whisper_decoder", **drafted)
    ratio("seam_draft_vs_whisper", "encoder draft_head stage_1_checked llm_checked", whisper, **drafted)
    ratio("seam_draft_vs_whisper_decoding", "draft_head stage_1_checked llm_checked", "whisper_decoder", **drafted)

    if setting.model.bridge is None:
        return
    roofline = Roofline(setting.machine, utterances)
    least = {
        "whisper_decoder": lambda _: roofline.whisper_decoder(),
        "stage_1": lambda _: roofline.stage_1(),
        "llm": lambda _: roofline.llm(),
        "llm_checked": lambda results: statistics.median(roofline.llm_checked(result.rows) for result in results),
    }
    for name in filter(measured.__contains__, least):
        seconds = least[name](measured[name].results)
        metric = f"{name.replace('stage_1', 'stage1')}_vs_roofline"
        findings.ratio(setting, metric, measured[name].median / seconds, roofline_seconds=seconds)


def stage_1(setting: Setting, findings: Findings):
    """Measure the ratios that do not involve the LLM."""
    ratios(
        setting, findings, ("encoder", "whisper_decoder", "stage_1", "draft_head", "stage_1_checked", "stage_1_active")
    )


def llm(setting: Setting, findings: Findings):
    """Measure the ratios that involve the LLM alone."""
    ratios(setting, findings, ("llm", "llm_checked"))


def _systems(setting: Setting, utterances: Utterances, only: Collection[str] | None = None) -> dict[str, Callable]:
    """Return the systems in the order in which they run."""
    systems = {
        "encoder": utterances.encoder,
        "whisper_decoder": utterances.whisper_decoder,
        "stage_1": utterances.stage_1,
        "draft_head": utterances.draft_head,
        "stage_1_checked": partial(utterances.stage_1_checked, AGREEMENT),
        "llm": utterances.llm,
        "llm_checked": partial(utterances.llm_checked, AGREEMENT),
    }
    if setting.active is not None:
        systems["stage_1_active"] = partial(utterances.stage_1, setting.active)
    return {name: system for name, system in systems.items() if only is None or name in only}


def agreement(setting: Setting, findings: Findings):
    """Compare the LLM with its plain loop for drafts of every agreement in `CURVE`, once each."""
    warm, utterances = setting.utterances(WARM_UP_TOKENS), setting.utterances(setting.tokens)

    def systems(utterances: Utterances) -> dict[str, Callable]:
        drafted = {f"llm_checked_{share:.0%}": partial(utterances.llm_checked, share) for share in CURVE}
        return {"llm": utterances.llm, **drafted}

    setting.measure(systems(warm), 1, "warm-up")
    measured = setting.measure(systems(utterances), 1, "agreement")
    findings.times(setting, "agreement", measured, utterances)
    for share in CURVE:
        name = f"llm_checked_{share:.0%}"
        findings.check(setting, utterances, name, measured, "llm")
        findings.ratio(
            setting,
            f"llm_vs_plain_agreement_{share * 100:.0f}",
            measured[name].median / measured["llm"].median,
            agreement=share,
            seconds=measured[name].median,
            against_seconds=measured["llm"].median,
        )


def linearity(setting: Setting, findings: Findings):
    """Compare the time per token of one, two and four times as many tokens."""
    systems, utterances = {}, {}
    for times in LENGTHS:
        utterances[times] = setting.utterances(times * setting.tokens)
        systems[f"stage_1 x{times}"] = utterances[times].stage_1
        systems[f"llm_checked x{times}"] = partial(utterances[times].llm_checked, AGREEMENT)
    warm = setting.utterances(WARM_UP_TOKENS)
    setting.measure({"stage_1": warm.stage_1, "llm": partial(warm.llm_checked, AGREEMENT)}, 1, "warm-up")
    measured = setting.measure(systems, setting.repeats, "linearity")
    for times in LENGTHS:
        of_length = {name: one for name, one in measured.items() if name.endswith(f" x{times}")}
        findings.times(setting, "linearity", of_length, utterances[times])
    for name in ("stage_1", "llm_checked"):
        for times in LENGTHS[1:]:
            ratio = measured[f"{name} x{times}"].median / measured[f"{name} x1"].median / times
            findings.ratio(setting, "linearity", ratio, loop=name, times=times, tokens=times * setting.tokens)


def profile(setting: Setting, findings: Findings):
    """Profile the loops by component, stock and ours; derive the share of the lookup in a step."""
    short, utterances = setting.utterances(min(setting.tokens, PROFILED_TOKENS)), setting.utterances(setting.tokens)
    loops = {
        "Whisper's decoder, stock": (short, short.whisper_decoder, stock_components(short)),
        "Stage 1, stock (before)": (short, short.stage_1_stock, stock_components(short)),
        "Stage 1 (after)": (short, short.stage_1, stage_1_components(short, short.lookup)),
        "Stage 1, random predictions": (short, short.stage_1_random, stage_1_components(short, short.lookup)),
        "LLM, stock (before)": (short, short.llm, llm_components(short)),
        "LLM, checked (after)": (utterances, partial(utterances.llm_checked, AGREEMENT), llm_components(utterances)),
    }
    shares = {
        "lookup_share": "Stage 1 (after)",
        "lookup_share_before": "Stage 1, stock (before)",
        "lookup_share_random": "Stage 1, random predictions",
    }
    if setting.active is not None:
        name = "Stage 1, active vocabulary"
        loops[name] = (short, partial(short.stage_1, setting.active), stage_1_components(short, setting.active))
        shares["lookup_share_active"] = name
    warm = setting.utterances(WARM_UP_TOKENS)
    setting.measure({**_systems(setting, warm), "stock": warm.stage_1_stock}, 1, "warm-up")
    runs = {name: [] for name in loops}
    with tqdm(total=setting.repeats * len(loops), desc=f"batch {setting.batch_size}, profile", leave=False) as progress:
        for _ in range(setting.repeats):
            for name, (_, system, components) in loops.items():
                progress.set_postfix_str(name)
                runs[name].append(time_components(system, components, setting.device))
                progress.update()
    for name, (profiled, _, _) in loops.items():
        seconds = {part: statistics.median(run[part] for run in runs[name]) for part in runs[name][0]}
        findings.profile.append(
            {"batch": setting.batch_size, "loop": name, "tokens": profiled.tokens, "components": seconds}
        )
    for metric, name in shares.items():
        findings.ratio(setting, metric, statistics.median(map(lookup_share, runs[name])))


def memory(setting: Setting, findings: Findings):
    """Compare the memory in use after many calls of `generate` with that after the warm-up."""
    model = setting.model
    # Where Stage 1 stops: it never predicts EOA.
    with patch.object(model.config.aligner_config, "max_target_positions", CALL_TOKENS + 1):
        for call in tqdm(range(CALLS), desc=f"batch {setting.batch_size}, calls", leave=False):
            if call == WARM_UP_CALLS:
                before = memory_in_use(setting.device)
            model.generate(setting.speech.features, max_new_tokens=CALL_TOKENS)
    after = memory_in_use(setting.device)
    findings.ratio(setting, f"memory_{CALLS}_calls", after / before, before_gb=before / 1e9, after_gb=after / 1e9)


PARTS = {part.__name__: part for part in (ratios, stage_1, llm, agreement, linearity, profile, memory)}
PARTS_OF_ALL = [name for name in PARTS if name not in ("stage_1", "llm")]  # which are subsets of `ratios`
LLM_PARTS = {"llm", "agreement"}
