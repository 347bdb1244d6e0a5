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
def test_check_unicode(value, reason):
    problem = checks.check_unicode(value)
    assert (problem and problem.reason) == reason
    if problem:
        problem.detail.encode()  # can be printed


def test_check_tokenizer():
    assert checks.check_tokenizer("a b", "a b") is None
    problem = checks.check_tokenizer("naïve ½", "naive ?")
    assert problem.reason == "tokenizer changes the text"
    assert "'naïve ½' comes back as 'naive ?', without '½' 'ï'" in problem.detail


def test_check_not_empty():
    assert checks.check_not_empty("a") is None
    assert checks.check_not_empty(" \n").reason == "empty text"


def test_sampling_rate():
    assert checks.check_sampling_rate(16000, 16000) is None and checks.check_sampling_rate(8000, None) is None
    assert checks.check_sampling_rate(8000, 16000).detail == "the header says 8000 Hz; the corpus has 16000 Hz"


def test_duration():
    assert checks.check_min_duration(0.1) is None and checks.check_min_duration(0.099).reason == "too short"
    assert checks.check_max_duration(30.0, 30.0) is None and checks.check_max_duration(30.01, 30.0).reason == "too long"


def test_check_finite():
    waveform = np.zeros(10)
    assert checks.check_finite(waveform) is None
    waveform[[3, 5]] = np.nan, -np.inf
    assert checks.check_finite(waveform).detail == "2 of 10 are NaN or infinite"


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
def test_check_not_silent(name, silent):
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
    problem = checks.check_not_silent(waveform, 16000)
    assert (problem is not None) == silent
    assert not silent or problem.reason == "silent"


@pytest.mark.parametrize(
    ("characters", "seconds", "plausible"),
    [(150, 10.0, True), (5, 0.18, True), (3, 3.0, True), (4, 10.0, False), (360, 10.0, False)],
)
def test_speaking_rate(characters, seconds, plausible):
    assert (checks.check_speaking_rate("x" * characters, seconds) is None) == plausible


def test_no_real_recording_fails(shared):
    """The fastest and the slowest digits of 2000 are within the bounds on the speaking rate."""
    for one in read_manifest(shared / "speech"):
        assert checks.check_speaking_rate(one.text, one.duration) is None, one
        assert checks.check_min_duration(one.duration) is None
