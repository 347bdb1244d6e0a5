"""What errors say."""

import pytest
from torch.utils.data import DataLoader, Dataset

from seam.data.errors import sentence_of


class Broken(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise FileNotFoundError("a.wav: no such audio file.")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_workers_error_says_what_it_would_say_without_one(workers):
    with pytest.raises(FileNotFoundError) as caught:
        list(DataLoader(Broken(), num_workers=workers))
    assert sentence_of(caught.value) == "a.wav: no such audio file."


def test_it_is_one_line_and_never_empty():
    assert sentence_of(ValueError("one\n  two ")) == "one two"
    assert sentence_of(MemoryError()) == "MemoryError"
