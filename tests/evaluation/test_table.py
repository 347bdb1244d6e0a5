"""The table says what the numbers say."""

import json

from seam.evaluation.table import FULL, GUIDED, STAGE1, WHISPER, notes, write_table

WER = {
    WHISPER: {"seen": 1.0, "other": 50.0},
    STAGE1: {"seen": 2.0, "other": 40.0},
    FULL: {"seen": 2.0, "other": 30.0},
    GUIDED: {"seen": 2.5, "other": 30.0},
}


def test_notes_say_where_a_step_helps_and_where_not():
    llm, guidance = notes(WER)
    assert "lower on other (-10.0)" in llm and "equal on seen" in llm
    assert "higher on seen (+0.5)" in guidance and "equal on other" in guidance


def test_files(tmp_path):
    write_table({"wer": WER, "words": {"seen": 10, "other": 20}, "notes": notes(WER)}, tmp_path)
    assert json.loads((tmp_path / "table.json").read_text())["wer"] == WER
    assert f"| {STAGE1} | 40.0 | 2.0 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.png").stat().st_size > 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json", "table.md", "table.png"]
