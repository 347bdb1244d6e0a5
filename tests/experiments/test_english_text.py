from pathlib import Path

import numpy as np
import pytest

from seam.data.manifest import Utterance, write_manifest
from seam.experiments.english_text import EnglishText, make_training_text, passages, sentences


def test_a_table_gives_its_last_column_and_a_book_its_paragraphs(tmp_path):
    table, book = tmp_path / "lines.tsv", tmp_path / "book.txt"
    table.write_text("a-1\tOne two. Three?\nb-2\tand four\n")
    book.write_text("It was\nlate. He\nslept.\n\n\nThen he woke.\n")
    assert list(sentences(table)) == ["One two.", "Three?", "and four"]
    assert list(sentences(book)) == ["It was late.", "He slept.", "Then he woke."]


def test_passages_hold_all_sentences_in_order_up_to_a_length():
    written = [f"{'word ' * (index % 7)}end{index}." for index in range(60)]
    made = list(passages(written, 20, np.random.default_rng(0)))
    assert " ".join(made) == " ".join(written)
    lengths = [len(one.split()) for one in made]
    assert max(lengths) <= 20 and len(set(lengths)) > 5


@pytest.fixture
def held_out(tmp_path) -> Path:
    said = Utterance(tmp_path / "a.wav", "AND NOW THE OLD GOAT EATS HAY", 1.0)
    return write_manifest(tmp_path / "test.jsonl", [said])


def test_what_a_held_out_transcript_says_is_left_out(held_out, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("Look, now the old goat eats hay!\n\nNow the goat eats old hay.\n")
    said = make_training_text(EnglishText(files=[str(book)], passage_words=1), tmp_path / "text.txt", [held_out])
    assert (tmp_path / "text.txt").read_text() == "Now the goat eats old hay.\n"
    assert said == "1 passages, 6 words"


def test_the_words_have_a_limit_and_the_seed_decides_which(held_out, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(f"Sentence number {index}." for index in range(100)))
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        text = EnglishText(files=[str(book)], words=30, passage_words=3, seed=seed)
        make_training_text(text, tmp_path / name, [held_out])
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1] != texts[2] and texts[0].count("\n") == 10
