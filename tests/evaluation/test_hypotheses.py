"""A run is read completely or not at all."""

import json

import pytest

from seam.evaluation.hypotheses import SYSTEMS, TABLE_1, read_hypotheses


def write_run(folder, ids) -> None:
    (folder / "hypotheses").mkdir()
    run = {"data": [{"utterances": 2}, {"utterances": 1}], "systems": ["full"]}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "hypotheses" / "full.jsonl").write_text("".join(json.dumps({"id": number}) + "\n" for number in ids))


def test_rows_come_in_the_order_of_the_manifests(tmp_path):
    write_run(tmp_path, [2, 0, 1])
    run, systems = read_hypotheses(tmp_path)
    assert run["systems"] == list(systems) == ["full"]
    assert [row["id"] for row in systems["full"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 0], "full.jsonl holds 2 of 3 utterances; the same `seam evaluate` finishes it"),
        ([0, 1, 2, 1], "full.jsonl holds other utterances than the 3 of run.json, or some of them twice"),
        ([0, 1, 2, 3], "full.jsonl holds other utterances than the 3 of run.json, or some of them twice"),
    ],
)
def test_missing_and_surplus_rows_are_named(ids, message, tmp_path):
    write_run(tmp_path, ids)
    with pytest.raises(ValueError, match=message):
        read_hypotheses(tmp_path)


def test_a_system_that_was_not_begun_is_unfinished(tmp_path):
    write_run(tmp_path, [0, 1, 2])
    (tmp_path / "hypotheses" / "full.jsonl").unlink()
    with pytest.raises(ValueError, match="full.jsonl holds 0 of 3 utterances"):
        read_hypotheses(tmp_path)


def test_a_damaged_run_is_named(tmp_path):
    write_run(tmp_path, [0, 1, 2])
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is damaged"):
        read_hypotheses(tmp_path)


def test_every_system_has_a_row_in_table_1():
    assert sorted(TABLE_1) == sorted(SYSTEMS)
