from pathlib import Path

import pytest
import torch

from seam.data.text import TextDataset, read_passages


def test_a_line_is_a_passage_that_knows_where_it_stands(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One two.\n\n  Three\u2028four.  \n", encoding="utf-8")
    first, second = read_passages(path)
    assert (first.text, second.text) == ("One two.", "Three\u2028four.")
    path.write_text("One two.", encoding="utf-8-sig")
    assert [one.text for one in read_passages(path)] == ["One two."]
    assert (first.audio, second.audio) == (Path(f"{path}:1"), Path(f"{path}:3"))


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.txt: no such text file"):
        read_passages(tmp_path / "none.txt")
    path = tmp_path / "text.txt"
    path.write_bytes("one\ncafé".encode("latin-1"))
    with pytest.raises(ValueError, match=r"text.txt, line 2 is not UTF-8"):
        read_passages(path)
    path.write_text(" \n\n")
    with pytest.raises(ValueError, match=r"text.txt holds no text"):
        read_passages(path)


def test_stage_1_seems_to_hear_every_token(processor, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("THE old GOAT\n")
    dataset = TextDataset(read_passages(path), processor)
    (item,) = (dataset[index] for index in range(len(dataset)))
    assert item["token_ids"].tolist() == processor.transcript_ids("the old goat")
    assert torch.equal(item["alignment_ids"], item["token_ids"]) and set(item) == {"token_ids", "alignment_ids"}
