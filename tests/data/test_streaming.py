"""Streams: every utterance once, in an order that the number of workers does not change."""

import tarfile
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from seam.data.augmentation import Augmentation
from seam.data.bad_audio import SkippedAudio
from seam.data.dataset import SpeechReader
from seam.data.manifest import Utterance, write_manifest
from seam.data.streaming import SpeechStream
from seam.tests.helpers.tar_shards import tone, write_shard

COUNT = 23
WORDS = ["one", "two", "three", "light", "stop", "music", "goat", "hay", "kitchen", "turn"]
TEXTS = {index: f"{WORDS[index // 10]} {WORDS[index % 10]}" for index in range(COUNT)}


@pytest.fixture
def manifest(tmp_path) -> str:
    made = []
    for index, text in TEXTS.items():
        path = tmp_path / f"{index}.wav"
        soundfile.write(path, tone(index, 0.3 + 0.02 * index), 16000)
        made.append(Utterance(path, text, 0.3 + 0.02 * index, split="train"))
    return str(write_manifest(tmp_path / "manifest.jsonl", made))


@pytest.fixture
def shards(tmp_path) -> str:
    """Three shards of different sizes, fewer than there will be workers, as a pattern."""
    for name, first, end in (("a", 0, 4), ("b", 4, 19), ("c", 19, COUNT)):
        write_shard(tmp_path / f"{name}.tar", {index: TEXTS[index] for index in range(first, end)})
    return str(tmp_path / "*.tar")


@pytest.fixture
def stream(processor):
    """Return a function that makes a stream of one pass, in batches of three."""

    def make(names, **kwargs):
        reader = SpeechReader(processor, augmentation=kwargs.pop("augmentation", None))
        shares = kwargs.pop("shares", lambda buffer: np.full(len(buffer), 1 / 3))
        return SpeechStream(names, reader, shares, **{"passes": 1, "buffer": 8, **kwargs})

    return make


def batches(stream, workers=0):
    """As items, whose tensors are cloned: one that arrives from a worker keeps a file open."""
    loader = DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=list)
    return [[{key: value.clone() for key, value in item.items()} for item in batch] for batch in loader]


def texts(made, processor):
    return [[processor.decode(item["token_ids"]) for item in batch] for batch in made]


@pytest.mark.medium
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2, 5])
@pytest.mark.parametrize("source", ["manifest", "shards"])
def test_ranks_and_workers_have_every_utterance_once(stream, processor, source, ranks, workers, request):
    names = [request.getfixturevalue(source)]
    seen = Counter()
    for rank in range(ranks):
        made = texts(batches(stream(names, rank=rank, ranks=ranks), workers), processor)
        assert all(len(batch) <= 3 for batch in made)
        seen.update(text for batch in made for text in batch)
    assert seen == Counter(TEXTS.values())


@pytest.mark.medium
def test_the_number_of_workers_changes_nothing(stream, manifest):
    settings = {"concatenation_probability": 0.5, "speeds": [0.9, 1.1], "noise_probability": 0.5, "time_masks": 1}
    augmentation = Augmentation(**settings)
    made = [
        batches(stream([manifest], rank=1, ranks=2, passes=2, augmentation=augmentation), workers)
        for workers in (0, 1, 2, 3)
    ]
    for other in made[1:]:
        for one_batch, other_batch in zip(made[0], other, strict=True):
            for one, another in zip(one_batch, other_batch, strict=True):
                assert all(torch.equal(one[key], another[key]) for key in one)


def test_passes_go_on_and_differ(stream, processor, shards):
    both = texts(batches(stream([shards], passes=2)), processor)
    flat = [text for batch in both for text in batch]
    assert Counter(flat[:COUNT]) == Counter(flat[COUNT:]) == Counter(TEXTS.values())
    assert flat[:COUNT] != flat[COUNT:] and flat[:COUNT] != list(TEXTS.values())
    endless = iter(stream([shards], passes=None))
    assert texts(islice(endless, len(both) + 20), processor)[: len(both)] == both
    assert texts(batches(stream([shards], passes=2, seed=1)), processor) != both


def test_of_a_split(stream, processor, shards, manifest):
    odd = [TEXTS[index] for index in range(1, COUNT, 2) if index % 3]
    made = texts(batches(stream([shards], split="train")), processor)
    assert Counter(text for batch in made for text in batch) == Counter(odd)
    with pytest.raises(ValueError, match="manifest.jsonl: no utterance of split 'test'"):
        next(iter(stream([manifest], split="test", passes=None)))


def test_batches_keep_a_budget(stream, manifest):
    def shares(buffer):
        return np.array([one.duration / 2 for one in buffer])

    made = batches(stream([manifest], shares=shares, buffer=100))
    frames = [[int(item["attention_mask"].sum()) for item in batch] for batch in made]
    assert sum(map(len, frames)) == COUNT and max(len(batch) * max(batch) for batch in frames) <= 200
    assert np.mean([len(batch) * max(batch) for batch in frames]) > 150


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_in_the_middle_reads_nothing_before_it(stream, processor, manifest, workers, monkeypatch):
    through = texts(batches(stream([manifest])), processor)
    resumed = stream([manifest])
    resumed.skip_batches(3)
    read = []
    if not workers:
        load = SpeechReader._load
        monkeypatch.setattr(SpeechReader, "_load", lambda self, audio: (read.append(audio), load(self, audio))[1])
    made = texts(batches(resumed, workers), processor)
    assert made == [[], [], [], *through[3:]]
    assert workers or len(read) == sum(map(len, through[3:]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_recording_is_skipped_and_named(stream, processor, tmp_path, workers):
    shard = write_shard(tmp_path / "a.tar", TEXTS, broken=(5,))
    skipped = SkippedAudio(tmp_path / "skipped.jsonl")
    made = texts(batches(stream([str(shard)], skipped=skipped), workers), processor)
    expected = {text for index, text in TEXTS.items() if index != 5}
    assert Counter(text for batch in made for text in batch) == Counter(expected)
    assert skipped.names() == [f"{shard}/some/00005.flac"]
    with pytest.raises(ValueError, match="a.tar/some/00005.flac: .*cannot be read as audio"):
        batches(stream([str(shard)], skipped=None), workers)


def test_what_does_not_fit_is_named(processor, manifest):
    reader = SpeechReader(processor, max_tokens=2)
    with pytest.raises(ValueError, match=r"\.wav: a transcript of \d tokens, but the aligner has positions for 2"):
        list(SpeechStream([manifest], reader, lambda buffer: np.ones(len(buffer)), passes=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_damaged_shard_has_lost_is_skipped_and_named(stream, processor, tmp_path, workers):
    shard = write_shard(tmp_path / "a.tar", {number: TEXTS[number] for number in range(8)})
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        content[tar.getmember("some/00003.flac").offset] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="a.tar at byte .* is no header"):
        batches(stream([str(shard)]), workers)
    skipped = SkippedAudio(tmp_path / "skipped.jsonl")
    read = texts(batches(stream([str(shard)], skipped=skipped), workers), processor)
    assert sorted(sum(read, [])) == sorted(TEXTS[number] for number in range(8) if number != 3)
    names = skipped.names()
    assert len(names) == 2 and "a.tar at byte" in names[0] and names[1].endswith("a.tar/some/00003")


@pytest.mark.medium
@pytest.mark.parametrize(("files", "ranks", "workers"), [(1, 2, 2), (4, 2, 2), (3, 2, 0), (1, 1, 3), (4, 1, 0)])
def test_of_datasets_every_utterance_once(stream, processor, manifest, tmp_path, files, ranks, workers):
    (tmp_path / "parquet").mkdir()
    for number in range(files):
        rows = {"audio": [], "sentence": []}
        for index in range(number, COUNT, files):
            content = (tmp_path / f"{index}.wav").read_bytes()
            rows["audio"].append({"bytes": content, "path": f"{index}.wav"})
            rows["sentence"].append(TEXTS[index])
        table = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
        table.to_parquet(tmp_path / "parquet" / f"train-{number}.parquet")
    names = [f"datasets:{tmp_path / 'parquet'}"]
    seen = Counter()
    for rank in range(ranks):
        made = texts(batches(stream(names, rank=rank, ranks=ranks), workers), processor)
        seen.update(text for batch in made for text in batch)
    assert seen == Counter(TEXTS.values())


def test_sources_of_two_kinds_are_refused(stream, manifest):
    with pytest.raises(ValueError, match="either all or none can begin with datasets:"):
        stream([manifest, "datasets:somewhere"])
