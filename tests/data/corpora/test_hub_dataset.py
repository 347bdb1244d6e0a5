"""Datasets of `datasets`, offline: Parquet with embedded audio as on the Hub, streamed or not, and saved ones."""

import io

import datasets
import pytest
import soundfile

from seam.data.corpora import hub_dataset
from seam.data.corpora.utterances import is_elsewhere
from seam.data.manifest import read_manifest
from seam.data.prepare import prepare
from seam.tests.helpers.sounds import tone, write

CARD = """\
---
configs:
- config_name: all
  data_files:
  - split: train.clean.100
    path: all/train.clean.100/*.parquet
  - split: test.other
    path: all/test.other/*.parquet
---
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def audio_bytes(waveform, rate=16000, format="FLAC") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, format=format)
    return file.getvalue()


def with_audio(columns: dict) -> datasets.Dataset:
    """Return a dataset whose column `audio` has the feature type of embedded audio files."""
    return datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(sampling_rate=16000))


def write_librispeech(root, contents: dict[str, list[tuple[str, bytes, str]]]):
    """As `openslr/librispeech_asr` is laid out: columns, splits, configuration."""
    for split, utterances in contents.items():
        rows = with_audio(
            {
                "file": [f"{id}.flac" for id, *_ in utterances],
                "audio": [{"bytes": flac, "path": f"{id}.flac"} for id, flac, _ in utterances],
                "text": [text for *_, text in utterances],
                "speaker_id": [int(id.split("-")[0]) for id, *_ in utterances],
                "chapter_id": [int(id.split("-")[1]) for id, *_ in utterances],
                "id": [id for id, *_ in utterances],
            }
        )
        (root / "all" / split).mkdir(parents=True)
        rows.to_parquet(root / "all" / split / "0000.parquet")
    (root / "README.md").write_text(CARD)


@pytest.mark.parametrize("streaming", [False, True])
def test_librispeech_of_the_hub(tmp_path, streaming):
    flacs = [audio_bytes(tone(1.0, 200 + 50 * number)) for number in range(3)]
    root = tmp_path / "librispeech_asr"
    write_librispeech(
        root,
        {
            "train.clean.100": [("84-121123-0000", flacs[0], "GO ON"), ("84-121123-0001", flacs[1], "STOP")],
            "test.other": [("1688-142285-0000", flacs[2], "TWO TIMES")],
        },
    )
    summary = prepare(hub_dataset.read(root, name="all", streaming=streaming), tmp_path / "out")
    kept = read_manifest(summary.manifest)
    assert [(one.text, one.speaker, one.corpus, one.split, one.duration) for one in kept] == [
        ("GO ON", "84", "librispeech_asr", "train.clean.100", 1.0),
        ("STOP", "84", "librispeech_asr", "train.clean.100", 1.0),
        ("TWO TIMES", "1688", "librispeech_asr", "test.other", 1.0),
    ]
    assert [one.audio.read_bytes() for one in kept] == flacs  # as they were, not decoded and written again
    assert kept[2].audio.relative_to(tmp_path / "out").parts == (
        "audio",
        "test.other",
        "1688",
        "test.other-000000-1688-142285-0000.flac",
    )
    only = hub_dataset.read(root, ["test.other"], name="all", streaming=streaming)
    assert [one.text for one in only] == ["TWO TIMES"]
    for arguments, message in (
        ({"splits": ["nope"], "name": "all"}, "nope.*test.other"),
        ({"name": "clean"}, "'clean' not found.*'all'"),
        ({"name": "all", "text_column": "words"}, "no column 'words'; its columns are file, audio, text"),
    ):
        with pytest.raises(ValueError, match=message):
            next(hub_dataset.read(root, streaming=streaming, **arguments))


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_by_name_and_rows_that_lack_something(tmp_path, streaming):
    flac, ogg, wav = (audio_bytes(tone(1.0, 300), format=format) for format in ("FLAC", "OGG", "WAV"))
    audio = [
        {"bytes": flac, "path": None},
        {"bytes": ogg, "path": "wrong.wav"},
        None,
        {"bytes": wav, "path": "b.wav"},
        {"bytes": flac[: len(flac) // 2], "path": "../../escaped.flac"},
        {"bytes": b"", "path": "c.flac"},
        {"bytes": flac, "path": "d.flac"},
    ]
    words = ["one", "two", "three", None, "five", "six", "seven"]
    table = datasets.Dataset.from_dict(
        {"recording": audio, "words": words, "id": ["s1", "s1", "s1", "s1", "", "s", "s"]}
    )
    table.to_parquet(tmp_path / "some.parquet")
    columns = {"audio_column": "recording", "text_column": "words", "streaming": streaming}
    summary = prepare(hub_dataset.read(tmp_path / "some.parquet", **columns), tmp_path / "out")
    kept = read_manifest(summary.manifest)
    assert [(one.text, one.audio.name, one.corpus) for one in kept] == [
        ("one", "train-000000-s1.flac", "some"),
        ("two", "train-000001-s1.ogg", "some"),  # by its first bytes; the same id is another recording
    ]
    assert summary.left_out == {
        "no audio file": 1,
        "empty text": 1,
        "cannot be decoded": 1,
        "empty file": 1,
        "duplicate audio": 1,
    }
    # What was left out leaves no file.
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*") if path.name != ".lock") == [
        "left_out.jsonl",
        "manifest.jsonl",
        "train-000000-s1.flac",
        "train-000001-s1.ogg",
    ]
    with pytest.raises(ValueError, match="no audio column that is known .*columns are recording, words, id"):
        next(hub_dataset.read(tmp_path / "some.parquet", streaming=streaming))


def test_paths_instead_of_bytes_are_used_where_they_are(tmp_path):
    file = write(tmp_path / "data" / "clips" / "a.wav", tone(1.0))
    (tmp_path / "data" / "rows.jsonl").write_text('{"audio": "clips/a.wav", "sentence": "hello"}\n')
    (one,) = hub_dataset.read(tmp_path / "data", streaming=True)
    assert one.audio == file and one.contents is None and one.text == "hello" and one.split == "train"


def rows_with_paths(folder, *paths):
    """Write rows as somebody else might: without bytes, with any path."""
    folder.mkdir(exist_ok=True)
    audio = [{"bytes": None, "path": str(path)} for path in paths]
    features = datasets.Features(
        {
            "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "text": datasets.Value("string"),
        }
    )
    texts = [f"text {number}" for number in range(len(paths))]
    rows = datasets.Dataset.from_dict({"audio": audio, "text": texts}, features=features)
    rows.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.mark.parametrize("streaming", [False, True])
def test_paths_outside_the_dataset_are_read_on_request_only(tmp_path, streaming):
    outside = write(tmp_path / "secret.wav", tone(1.0))
    write(tmp_path / "data" / "a.wav", tone(1.0, 300))
    paths = ["a.wav", outside, "../secret.wav", f"file://{outside}", "s3://bucket/a.wav", "nonsense://a.wav"]
    file = rows_with_paths(tmp_path / "data", *paths)
    first, *others = hub_dataset.read(file, streaming=streaming)
    assert first.audio == tmp_path / "data" / "a.wav"
    assert [one.reason for one in others] == ["outside the corpus"] * 5
    assert "file:///" in others[2].detail and "--allow-remote" in others[2].detail
    _, absolute, up, url, bucket, nonsense = hub_dataset.read(file, streaming=streaming, allow_remote=True)
    assert absolute.audio == outside and up.audio.resolve() == outside
    assert url.contents == outside.read_bytes() and bucket.reason == nonsense.reason == "cannot be read"


def test_what_belongs_to_a_dataset_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "home")
    cached = tmp_path / "home" / "datasets" / "downloads" / "a.wav"
    for path in ("hf://datasets/me/mine@main/a.wav", "zip://b.wav::hf://datasets/me/mine/a.zip", str(cached)):
        assert not is_elsewhere(path, "me/mine")
    for path in (
        "hf://datasets/me/other@main/a.wav",
        "hf://datasets/me/mine@main/../other/a.wav",
        "https://host/a.wav",
        f"{cached.parent}/../../../../a.wav",
        "/etc/passwd",
        "a.wav",
    ):
        assert is_elsewhere(path, "me/mine")


def test_saved_datasets(tmp_path):
    rows = with_audio({"audio": [{"bytes": audio_bytes(tone(1.0)), "path": "a.flac"}], "text": ["hello"]})
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    assert [one.text for one in hub_dataset.read(tmp_path / "rows")] == ["hello"]
    assert [one.split for one in hub_dataset.read(tmp_path / "splits")] == ["train", "test"]
    assert [one.split for one in hub_dataset.read(tmp_path / "splits", ["test"])] == ["test"]
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        next(hub_dataset.read(tmp_path / "splits", ["dev"]))


def test_a_dataset_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="nobody/nothing"):
        next(hub_dataset.read("nobody/nothing"))


def test_real_recordings(shared, tmp_path):
    published = read_manifest(shared / "speech", corpus="librispeech test-other")[:6]
    utterances = [(one.audio.stem, one.audio.read_bytes(), one.text.upper()) for one in published]
    write_librispeech(tmp_path / "hub", {"train.clean.100": utterances[:1], "test.other": utterances[1:]})
    for streaming in (False, True):
        found = hub_dataset.read(tmp_path / "hub", ["test.other"], name="all", streaming=streaming)
        summary = prepare(found, tmp_path / str(streaming))
        kept = read_manifest(summary.manifest)
        assert [(one.text, one.audio.read_bytes()) for one in kept] == [
            (text, flac) for _, flac, text in utterances[1:]
        ]
        assert not summary.left_out
