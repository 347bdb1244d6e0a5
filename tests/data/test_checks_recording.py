"""What decoding a file says about it."""

import numpy as np
import pytest
import soundfile

from seam.data.checks import Recording, check_recording
from seam.tests.helpers.sounds import tone, write


def of(path, text="hello there", segment=None, cut_to=None, rate=None, max_seconds=30.0):
    return check_recording(Recording(path, text, segment, cut_to, rate, max_seconds))


def test_a_good_recording(tmp_path):
    result = of(write(tmp_path / "a.flac", tone(1.25)))
    assert result.problem is None and result.seconds == 1.25


def test_the_digest_is_that_of_the_sound_not_of_the_file(tmp_path):
    flac = write(tmp_path / "a.flac", tone(1.0))
    wav = write(tmp_path / "b.wav", soundfile.read(flac, dtype="int16")[0])
    other, slower = write(tmp_path / "c.wav", tone(1.0, 221)), write(tmp_path / "d.wav", tone(1.0), 8000)
    digests = [of(path).digest for path in (flac, wav, other, slower)]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_stereo_is_mixed_down_as_for_the_model(tmp_path):
    left = tone(1.0)
    both = write(tmp_path / "a.wav", np.stack([left, left], axis=1))
    opposite = write(tmp_path / "b.wav", np.stack([left, -left], axis=1))
    assert of(both).problem is None and of(opposite).problem.reason == "silent"


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
def test_truncated_flac_is_found_wherever_it_ends(tmp_path, share):
    path = write(tmp_path / "a.flac", tone(5.0) + 0.1 * np.random.default_rng(0).standard_normal(80000))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert of(path).problem.reason == "cannot be decoded"
    assert str(path) in of(path).problem.detail


def test_truncated_wav_is_found_and_a_length_that_is_unknown_is_not(tmp_path):
    path = write(tmp_path / "a.wav", tone(2.0))
    whole = path.read_bytes()
    assert whole[36:44] == b"data" + (64000).to_bytes(4, "little")
    path.write_bytes(whole[:30044])
    problem = of(path).problem
    assert problem == ("truncated", f"{path}: 30000 bytes of the 64000 that its header states")
    for length in (64010, 0x7FFFFFFF, 0xFFFFFFFF):  # ten bytes too many; written to a pipe
        path.write_bytes(whole[:40] + length.to_bytes(4, "little") + whole[44:])
        result = of(path)
        assert result.problem is None and result.seconds == 2.0


def test_what_else_can_be_wrong(tmp_path):
    (tmp_path / "empty.flac").touch()
    (tmp_path / "page.flac").write_text("<html>")
    (tmp_path / "samples.raw").write_bytes(bytes(32000))
    nan = tone(1.0)
    nan[5] = np.nan
    soundfile.write(tmp_path / "nan.wav", nan, 16000, subtype="FLOAT")
    good = write(tmp_path / "good.wav", tone(2.0))
    cases = [
        (of(tmp_path / "missing.flac"), "no audio file"),
        (of(tmp_path), "no audio file"),
        (of(tmp_path / "empty.flac"), "empty file"),
        (of(tmp_path / "page.flac"), "cannot be decoded"),
        (of(tmp_path / "samples.raw"), "cannot be decoded"),
        (of(tmp_path / "nan.wav"), "samples not finite"),
        (of(good, rate=8000), "wrong sampling rate"),
        (of(good, max_seconds=1.9), "too long"),
        (of(good, "x" * 80), "characters per second"),
        (of(write(tmp_path / "none.wav", np.zeros(0))), "too short"),
        (of(good, segment=(1.0, 2.2)), "segment after the end"),
    ]
    for result, reason in cases:
        assert result.problem.reason == reason


def test_a_segment_that_ends_with_the_rounding_of_its_times_is_cut_at_the_end(tmp_path):
    good = write(tmp_path / "good.wav", tone(2.0))
    result = of(good, segment=(1.5, 2.01), cut_to=tmp_path / "cut" / "a.flac")
    assert result.problem is None and result.seconds == 0.5
    samples, whole = soundfile.read(tmp_path / "cut" / "a.flac")[0], soundfile.read(good)[0]
    np.testing.assert_array_equal(samples, whole[24000:])


def test_a_segment_with_a_problem_is_not_written(tmp_path):
    silent = write(tmp_path / "a.wav", np.zeros(32000))
    assert of(silent, segment=(0.5, 1.5), cut_to=tmp_path / "cut" / "a.flac").problem.reason == "silent"
    assert not (tmp_path / "cut").exists()


def test_a_folder_that_cannot_be_written_is_not_the_fault_of_the_recording(tmp_path):
    good = write(tmp_path / "good.wav", tone(2.0))
    with pytest.raises(OSError):
        of(good, segment=(0.5, 1.5), cut_to=good / "a.flac")
