import pytest

from seam.data.files import replacing, write_text


def test_an_older_file_is_replaced_at_once(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "älter\n")
    with replacing(path) as temporary:
        temporary.write_bytes(b"newer")
        assert path.read_text(encoding="utf-8") == "älter\n"
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_older_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "older")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half of")
        raise KeyboardInterrupt
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]
