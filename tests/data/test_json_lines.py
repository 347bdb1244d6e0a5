import pytest

from seam.data.json_lines import read_rows, repair


def test_rows_are_lines_however_odd_their_characters(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x\u2028y"}\n{"a": 2}', encoding="utf-8")
    assert read_rows(path) == [{"a": "x\u2028y"}, {"a": 2}]


def test_an_unfinished_line_is_left_out_or_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    assert read_rows(path, unfinished=True) == [{"a": 1}]
    with pytest.raises(ValueError, match="a.jsonl, line 2 is damaged"):
        read_rows(path)
    assert repair(path) == [{"a": 1}] and path.read_bytes() == b'{"a": 1}\n'
    assert repair(tmp_path / "none.jsonl") == []


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\xff\n{"a": 3}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 2 is damaged"):
        repair(path)
