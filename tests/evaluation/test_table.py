"""The table says what the numbers say."""

import json

from seam.evaluation.hypotheses import SYSTEMS, TABLE_1
from seam.evaluation.table import notes, write_table

WHISPER, STAGE1, FULL, GUIDED = (SYSTEMS[name].row for name in TABLE_1)

WER = {
    WHISPER: {"seen": 1.0, "other": 50.0},
    STAGE1: {"seen": 2.0, "other": 40.0},
    FULL: {"seen": 2.0, "other": 30.0},
    GUIDED: {"seen": 2.5, "other": 30.0},
}


def test_notes_say_where_a_step_helps_and_where_not():
    llm, guidance = notes(WER)
    assert "lower on other (-10.0)" in llm and "higher on seen (+0.5)" in llm
    assert "higher on seen (+0.5)" in guidance and "equal on other" in guidance


INTERVAL = {system: {test: [rate - 0.5, rate + 1.25] for test, rate in rates.items()} for system, rates in WER.items()}


def test_files(tmp_path):
    table = {"wer": WER, "interval": INTERVAL, "words": {"seen": 10, "other": 20}, "notes": notes(WER)}
    write_table(table, tmp_path)
    assert json.loads((tmp_path / "table.json").read_text()) == table
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert f"| {STAGE1} | 40.0 (39.5–41.2) | 2.0 (1.5–3.2) |" in text and "95 %" in text
    assert (tmp_path / "table.png").stat().st_size > 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json", "table.md", "table.png"]


def test_a_rate_outside_of_its_interval_is_drawn(tmp_path):
    """A percentile interval of few utterances can leave the rate out."""
    interval = {system: {test: [rate + 1, rate + 2] for test, rate in rates.items()} for system, rates in WER.items()}
    write_table({"wer": WER, "interval": interval, "words": {"seen": 1, "other": 1}, "notes": []}, tmp_path)
    assert (tmp_path / "table.png").stat().st_size > 5000
