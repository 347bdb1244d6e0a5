"""Each check on cases computed by hand."""

import numpy as np
import pytest

from seam.data import checks
from seam.data.manifest import read_manifest
from seam.tests.helpers.sounds import tone


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("café 你好", None),
        (b"caf\xe9".decode(errors="surrogateescape"), "not UTF-8"),
        ("caf\N{REPLACEMENT CHARACTER}", "replaced characters"),
    ],
)
def test_is_unicode(value, reason):
    problem = checks.is_unicode(value)
    assert (problem and problem.reason) == reason
    if problem:
        problem.detail.encode()  # can be printed


def test_text_comes_back():
    assert checks.text_comes_back("a b", "a b") is None
    problem = checks.text_comes_back("naïve ½", "naive ?")
    assert problem.reason == "tokenizer changes the text"
    assert "'naïve ½' comes back as 'naive ?', without '½' 'ï'" in problem.detail


def test_text_is_there():
    assert checks.text_is_there("a") is None
    assert checks.text_is_there(" \n").reason == "empty text"


def test_sampling_rate():
    assert checks.sampling_rate_is(16000, 16000) is None and checks.sampling_rate_is(8000, None) is None
    assert checks.sampling_rate_is(8000, 16000).detail == "the header says 8000 Hz; the corpus has 16000 Hz"


def test_duration():
    assert checks.long_enough(0.1) is None and checks.long_enough(0.099).reason == "too short"
    assert checks.short_enough(30.0, 30.0) is None and checks.short_enough(30.01, 30.0).reason == "too long"


def test_samples_are_finite():
    waveform = np.zeros(10)
    assert checks.samples_are_finite(waveform) is None
    waveform[[3, 5]] = np.nan, -np.inf
    assert checks.samples_are_finite(waveform).detail == "2 of 10 are NaN or infinite"


@pytest.mark.parametrize(
    ("name", "silent"),
    [
        ("zeros", True),
        ("offset", True),
        ("click", True),
        ("-72 dBFS", True),
        ("-60 dBFS", False),
        ("short word", False),
    ],
)
def test_not_silent(name, silent):
    quiet = tone(2.0) / 0.3 * np.sqrt(2)  # RMS 1
    click = np.zeros(32000)
    click[16000] = 0.9
    word = np.zeros(32000)
    word[8000:9600] = tone(0.1)
    waveform = {
        "zeros": np.zeros(32000),
        "offset": np.full(32000, 0.2),
        "click": click,
        "-72 dBFS": quiet * 10 ** (-72 / 20),
        "-60 dBFS": quiet * 10 ** (-60 / 20),
        "short word": word,
    }[name]
    problem = checks.not_silent(waveform, 16000)
    assert (problem is not None) == silent
    assert not silent or problem.reason == "silent"


@pytest.mark.parametrize(
    ("characters", "seconds", "plausible"),
    [(150, 10.0, True), (5, 0.18, True), (3, 3.0, True), (4, 10.0, False), (360, 10.0, False)],
)
def test_speaking_rate(characters, seconds, plausible):
    assert (checks.speaking_rate_is_plausible("x" * characters, seconds) is None) == plausible


def test_no_real_recording_fails(shared):
    """The fastest and the slowest digits of 2000 are within the bounds on the speaking rate."""
    for one in read_manifest(shared / "speech"):
        assert checks.speaking_rate_is_plausible(one.text, one.duration) is None, one
        assert checks.long_enough(one.duration) is None
