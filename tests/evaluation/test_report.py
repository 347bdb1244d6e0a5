"""The report, from hypotheses written by hand and from a run of the shipped checkpoint."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from seam.evaluation.decoding import decode_test_sets
from seam.evaluation.report import ALL, eval_results, markdown, write_report
from seam.publishing.card import write_card
from seam.tests.helpers.shipped import RECORDINGS, TINY

FILES = ["errors.md", "rates.png", "results.json", "results.md", "results.png", "results.yaml"]
EXAMPLES = [
    # test set, seconds, wall, reference, its tokens, Stage 1's, transcript and its tokens
    ("clean", 2.0, 0.5, "Twenty-five colours", [1, 2, 3], [1, 2], "25 color", [1, 9]),
    ("clean", 4.0, 0.5, "He won't go home", [4, 5], [6, 5, 5], "go go go go home", [7, 5]),
    ("clean", 1.0, 0.25, "Yes.", [8], [8], " ", []),
    ("clean", 1.0, 0.25, " ", [], [1], "", []),
    ("other", 8.0, 1.0, "one two", [1, 2], [1, 2, 3, 4], "one two", [1, 2]),
]


def row(number: int, test_set, seconds, wall, reference, reference_tokens, stage1_tokens, text, tokens) -> dict:
    return {
        "id": number,
        "audio": f"{number}.wav",
        "test_set": test_set,
        "seconds": seconds,
        "wall_seconds": wall,
        "reference": reference,
        "reference_tokens": reference_tokens,
        "stage1": "",
        "stage1_tokens": stage1_tokens,
        "embeddings": len(stage1_tokens),
        "text": text,
        "tokens": tokens,
    }


def write_run(folder, **systems):
    run = {
        "data": [{"manifest": "m.jsonl", "utterances": len(next(iter(systems.values()))), "sha256": ""}],
        "casing": "lower",
        "batch_size": 2,
        "model": {"name": "by-hand", "sha256": ""},
        "dtype": "float32",
        "systems": list(systems),
        "hardware": ["an abacus"],
        "software": "none",
    }
    (folder / "hypotheses").mkdir()
    (folder / "run.json").write_text(json.dumps(run))
    for system, rows in systems.items():
        lines = [json.dumps(one) for one in reversed(rows)]  # in the order in which they were decoded
        (folder / "hypotheses" / f"{system}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def by_hand(tmp_path):
    write_run(tmp_path, full=[row(number, *example) for number, example in enumerate(EXAMPLES)])
    return tmp_path


def test_figures_by_hand(by_hand):
    results = write_report(by_hand)
    scores = results["systems"]["full"]["clean"]
    # english: 25 colors | 25 color: 1 of 2; he will not go home | go go go go home: 3 substitutions of 5; yes left out
    english = scores["wer"]["english"]
    assert (english["insertions"], english["deletions"], english["substitutions"], english["words"]) == (0, 1, 4, 8)
    assert english["rate"] == 62.5 and english["interval"][0] < 62.5 < english["interval"][1] <= 100
    # basic: twenty five colours | 25 color: 2 substitutions, 1 left out of 3; he won t go home: 3 of 5; yes of 1
    basic = scores["wer"]["basic"]
    assert (basic["insertions"] + basic["deletions"] + basic["substitutions"], basic["words"]) == (7, 9)
    assert basic["rate"] == 77.7778
    assert scores["cer"]["english"]["characters"] == len("25 colors") + len("he will not go home") + len("yes")
    assert scores["first_token"] == 33.3333 and scores["stage1_first_token"] == 66.6667  # of three with a reference
    assert scores["loops"] == 25 and scores["empty"] == 25 and scores["failed"] == 0
    assert scores["rtfx"] == pytest.approx(8 / 1.5, abs=1e-4)
    assert results["test_sets"] == {
        "clean": {"utterances": 4, "seconds": 8.0},
        "other": {"utterances": 1, "seconds": 8.0},
        ALL: {"utterances": 5, "seconds": 16.0},
    }
    everything = results["systems"]["full"][ALL]
    assert everything["wer"]["english"]["words"] == 9 and everything["wer"]["english"]["rate"] == 55.5556
    assert everything["rtfx"] == 6.4
    rates = {unit: rate["corpus"] for unit, rate in results["rates"]["clean"].items()}
    assert rates == {
        "words": 7 / 8,
        "tokens": 6 / 8,
        "embeddings": 7 / 8,
        "tokens_with_ends": 14 / 8,
        "embeddings_with_ends": 15 / 8,
    }


def test_files(by_hand):
    results = write_report(by_hand)
    assert sorted(path.name for path in by_hand.iterdir()) == sorted([*FILES, ".lock", "hypotheses", "run.json"])
    assert json.loads((by_hand / "results.json").read_text(encoding="utf-8")) == results
    text = (by_hand / "results.md").read_text(encoding="utf-8")
    assert text.startswith("# Results of by-hand\n") and text.endswith(markdown(results))
    assert (
        "| WER %, Whisper's English normaliser | clean (8 words) | other (1 words) | all test sets (9 words) |" in text
    )
    low, high = results["systems"]["full"]["clean"]["wer"]["english"]["interval"]
    assert f"| full | 62.5 ({low:.1f}–{high:.1f}) | 0.0 (0.0–0.0) |" in text
    assert "| clean | full | 8 | 0 | 1 | 4 |" in text and "| 33.3 | 66.7 | 25.0 | 25.0 | 5.3 |" in text
    assert "| clean | 4 | 0.1 | 0.88 | 0.75 | 0.88 | 1.75 | 1.88 |" in text and "an abacus" in text
    errors = (by_hand / "errors.md").read_text(encoding="utf-8")
    assert "- 0.wav (clean), 1 of 2: 25 [colors → color]" in errors and "4.wav" not in errors
    assert errors.index("1.wav (clean), 3 of 5") < errors.index("0.wav") < errors.index("2.wav")
    for name in ("results.png", "rates.png"):
        assert (by_hand / name).read_bytes()[:4] == b"\x89PNG" and (by_hand / name).stat().st_size > 5000


def test_hub_metadata(by_hand):
    write_report(by_hand)
    index = yaml.safe_load((by_hand / "results.yaml").read_text(encoding="utf-8"))["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name == "by-hand"
    assert [(one.dataset_name, one.metric_type, one.metric_name, one.metric_value) for one in results[:2]] == [
        ("clean", "wer", "WER, Whisper's English normaliser", 62.5),
        ("clean", "wer", "WER, Whisper's basic normaliser", 77.78),
    ]
    assert [one.metric_type for one in results] == ["wer", "wer", "cer", "cer"] * 2
    assert {one.dataset_name for one in results} == {"clean", "other"} and len(results) == 8
    assert {one.task_type for one in results} == {"automatic-speech-recognition"}


def test_the_card_takes_the_results(by_hand, model, processor, tmp_path):
    write_report(by_hand)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("results.json", "results.png"):
        shutil.copy(by_hand / name, folder)
    write_card(model, processor, folder, "user/tones")
    card = ModelCard.load(folder / "README.md")
    found = {(one.dataset_name, one.metric_name): one.metric_value for one in card.data.eval_results}
    assert found["clean", "WER, Whisper's English normaliser"] == 62.5 and card.data.model_name == "tones"
    assert "| clean | full | 8 | 0 | 1 | 4 |" in card.text and "](results.png)" in card.text
    assert "table.png" not in card.text
    (folder / "results.json").write_text('{"run": {}}')
    with pytest.raises(ValueError, match="results.json has no key 'test_sets'"):
        write_card(model, processor, folder, "user/tones")


def test_the_models_own_system_is_on_the_card(tmp_path):
    rows = [row(number, *example) for number, example in enumerate(EXAMPLES)]
    write_run(tmp_path, **{"stage1": [{**one, "text": ""} for one in rows], "full-noftg": rows})
    write_report(tmp_path)
    index = yaml.safe_load((tmp_path / "results.yaml").read_text(encoding="utf-8"))["model-index"]
    assert model_index_to_eval_results(index)[1][0].metric_value == 62.5  # stage1, without a word, has 100


def test_what_could_not_be_read_is_counted_as_empty_and_named(tmp_path):
    rows = [row(number, *example) for number, example in enumerate(EXAMPLES)]
    lost = {
        "text": "",
        "tokens": [],
        "stage1_tokens": [],
        "embeddings": 0,
        "wall_seconds": 0.0,
        "error": "4.wav: no such audio file.",
    }
    write_run(tmp_path, full=[*rows[:4], {**rows[4], **lost}])
    results = write_report(tmp_path)
    scores = results["systems"]["full"]["other"]
    assert scores["failed"] == 1 and scores["wer"]["basic"]["deletions"] == 2 and scores["rtfx"] is None
    assert scores["wer"]["basic"]["rate"] == 100 and scores["first_token"] == 0 and scores["empty"] == 100
    assert results["systems"]["full"][ALL]["rtfx"] == pytest.approx(8 / 1.5, abs=1e-4)
    assert set(results["rates"]) == {"clean", ALL} and results["rates"][ALL] == results["rates"]["clean"]
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "Audio that full could not read: 1 of other, 1 of all test sets; scored as empty" in text
    assert "| all test sets | 4 | 0.1 |" in text and "| 0.0 | 0.0 | 0.0 | 100.0 | – |" in text
    assert "- 4.wav (other) was not read: 4.wav: no such audio file." in (tmp_path / "errors.md").read_text()


def test_a_test_set_whose_script_the_english_normaliser_spoils_is_named(tmp_path):
    rows = [
        row(0, "hindi", 1.0, 0.1, "\u0915\u093f", [1], [1], "\u0915\u0940", [1]),
        row(1, "plain", 1.0, 0.1, "one", [1], [1], "one", [1]),
    ]
    write_run(tmp_path, full=rows)
    results = write_report(tmp_path)
    assert results["not_english"] == ["hindi"]
    assert results["systems"]["full"]["hindi"]["wer"]["basic"]["rate"] == 100
    assert "Whisper's English normaliser does not fit hindi: it drops vowels" in (tmp_path / "results.md").read_text()
    named = [(one.dataset_name, one.metric_name) for one in eval_results(results)]
    assert ("plain", "WER, Whisper's English normaliser") in named
    assert ("hindi", "WER, Whisper's basic normaliser") in named
    assert ("hindi", "WER, Whisper's English normaliser") not in named


def test_nothing_but_unreadable_audio_has_a_report(tmp_path):
    lost = {"text": "", "tokens": [], "stage1_tokens": [], "embeddings": 0, "wall_seconds": 0.0, "error": "x"}
    write_run(tmp_path, stage1=[{**row(0, *EXAMPLES[0]), **lost}])
    assert write_report(tmp_path)["rates"] == {} and not (tmp_path / "rates.png").exists()


def test_scoring_alone_gives_the_same_files(tmp_path):
    decode_test_sets(str(TINY), [RECORDINGS / "manifest.jsonl"], tmp_path)
    results = write_report(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    for name in FILES:
        (tmp_path / name).unlink()
    write_report(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == before
    scores = results["systems"]["full"]["recordings"]
    assert scores["wer"]["basic"]["rate"] < 15 and scores["wer"]["basic"]["words"] == 51 and scores["rtfx"] > 0
