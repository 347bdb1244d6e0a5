import hashlib
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from torch.utils.data import DataLoader, Dataset

from seam.data.checks import write_audio
from seam.data.files import (
    check_path,
    copy_file,
    one_line,
    read_json_lines,
    recipe_file,
    repair_json_lines,
    replacing,
    sha256_of,
    write_text,
    writing,
)
from seam.data.manifest import Utterance, write_manifest


def test_an_older_file_is_replaced_at_once(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "älter\n")
    with replacing(path) as temporary:
        temporary.write_bytes(b"newer")
        assert path.read_text(encoding="utf-8") == "älter\n"
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def little_room():
    """Limit the size of files, which stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_rows(path):
    with writing(path), path.open("a") as file:
        file.write("x" * 2000)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x" * 2000),
        lambda path: copy_file(Path(__file__), path),
        lambda path: write_audio(path, np.random.default_rng(0).normal(0, 0.1, 9000), 16000),
        lambda path: write_manifest(path, [Utterance(Path("a.wav"), "word " * 500, 1.0)]),
        write_rows,
    ],
)
def test_a_full_disk_is_one_sentence_with_the_files_name(tmp_path, little_room, write):
    with pytest.raises(OSError) as caught:
        write(tmp_path / "a.wav")
    assert str(caught.value) == f"{tmp_path / 'a.wav'} cannot be written: File too large."
    assert not (tmp_path / "a.wav.tmp").exists()


def test_other_errors_of_the_system_stay_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.wav"), replacing(tmp_path / "a.txt"):
        (tmp_path / "none.wav").read_bytes()


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_what_a_library_writes_for_its_owner_alone_is_as_readable_as_other_files(tmp_path, mask):
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "a.safetensors") as temporary:
            save_file({"a": np.zeros(2)}, temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_recipe_of_the_package_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_file("recipes/own/alignment.yaml").is_file()
    assert not recipe_file("recipes/own/none.yaml").is_file()
    own = tmp_path / "recipes" / "own"
    own.mkdir(parents=True)
    (own / "alignment.yaml").write_text("seed: 1")
    assert recipe_file("recipes/own/alignment.yaml").read_text() == "seed: 1"  # the one that is here comes first


def test_a_mistyped_path_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "tiny").mkdir(parents=True)
    for name in ("checkpoints/tinny", "./checkpoints/tinny"):
        with pytest.raises(
            FileNotFoundError, match=f"the checkpoint '{name}': no such folder; did you mean checkpoints/tiny"
        ):
            check_path(name)
    for name in ("/nowhere/tiny", "runs/a/b", "~/model"):
        with pytest.raises(FileNotFoundError, match="no such folder.$"):
            check_path(name)
    for name in ("checkpoints/tiny", "owner/name", "gpt2"):
        check_path(name)


def test_a_failed_write_leaves_the_older_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "older")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half of")
        raise KeyboardInterrupt
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


class Broken(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise FileNotFoundError("a.wav: no such audio file.")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_workers_error_says_what_it_would_say_without_one(workers):
    with pytest.raises(FileNotFoundError) as caught:
        list(DataLoader(Broken(), num_workers=workers))
    assert one_line(caught.value) == "a.wav: no such audio file."


def test_it_is_one_line_and_never_empty():
    assert one_line(ValueError("one\n  two ")) == "one two"
    assert one_line(MemoryError()) == "MemoryError"


def test_rows_are_lines_however_odd_their_characters(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x\u2028y"}\n{"a": 2}', encoding="utf-8")
    assert read_json_lines(path) == [{"a": "x\u2028y"}, {"a": 2}]


def test_an_unfinished_line_is_left_out_or_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    assert read_json_lines(path, ignore_unfinished=True) == [{"a": 1}]
    with pytest.raises(ValueError, match="a.jsonl, line 2 is damaged"):
        read_json_lines(path)
    assert repair_json_lines(path) == [{"a": 1}] and path.read_bytes() == b'{"a": 1}\n'
    assert repair_json_lines(tmp_path / "none.jsonl") == []


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\xff\n{"a": 3}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 2 is damaged"):
        repair_json_lines(path)


def test_a_digest_is_that_of_the_parts_one_after_another(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"file")
    parts = [b"bytes", path, {"b": 1, "a": "ä"}, ["x", 2.5], np.array([1, 2], dtype=np.uint8)]
    content = b'bytesfile{"a": "\\u00e4", "b": 1}["x", 2.5]\x01\x02'
    assert sha256_of(parts) == hashlib.sha256(content).hexdigest()
