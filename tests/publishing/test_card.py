"""The card is filled from files, and is one that the Hub's own client reads."""

import json

import pytest
from huggingface_hub import ModelCard

from seam.evaluation.hypotheses import SYSTEMS
from seam.publishing.card import write_card

STAGE1, GUIDED = SYSTEMS["stage1"].row, SYSTEMS["full"].row
TABLE = {
    "wer": {STAGE1: {"own voices": 12.5}, GUIDED: {"own voices": 12.345}},
    "interval": {STAGE1: {"own voices": [10.0, 14.0]}, GUIDED: {"own voices": [9.5, 15.25]}},
    "words": {"own voices": 80},
    "notes": ["A note."],
}


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_card(model, processor, tmp_path):
    texts = {
        "title": "Tones",
        "language": "en",
        "training_data": "Sounds of four lengths.",
        "licences": {"encoder": "MIT"},
        "license": "apache-2.0",
    }
    write(tmp_path, card=texts, table=TABLE)
    write_card(model, processor, tmp_path, "user/tones")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "card.json", "table.json"]
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "automatic-speech-recognition" and card.data.license == "apache-2.0"
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_type) == ("own voices", "own-voices")
    assert (result.metric_type, result.metric_value, card.data.model_name) == ("wer", 12.35, "Tones")
    assert f"| {GUIDED} | 12.3 (9.5–15.2) |" in card.text and "| encoder | MIT |" in card.text
    assert "Sounds of four lengths." in card.text and "windows of 2 s" in card.text
    assert 'model="user/tones", trust_remote_code=True' in card.text and "title = {{SEAM}: Bridging" in card.text
    assert "{%" not in card.text and "{{ " not in card.text and "table.png" not in card.text
    encoder = sum(parameter.numel() for parameter in model.encoder.parameters())
    assert f"{encoder / 1e6:.2f}M parameters" in card.text


def test_a_checkpoint_alone_has_a_card(model, processor, tmp_path):
    write_card(model, processor, tmp_path, "user/tones")
    card = ModelCard.load(tmp_path / "README.md")
    assert "# tones\n" in card.text and card.data.eval_results is None and card.data.license is None
    assert "## Training data\n\nNot stated." in card.text and "## Results\n\nNot stated." in card.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"card": {"titel": "x"}}, "card.json: unknown key 'titel'"),
        ({"card": {"title": 3}}, "card.json: .*'title'"),
        ({"card": "{"}, "card.json is not JSON"),
        ({"card": []}, "card.json is not a JSON object"),
        ({"table": {"wer": {}}}, "table.json has no key 'interval'"),
        ({"card": {"system": "ours"}, "table": TABLE}, "card.json: system is 'ours'; the rows"),
    ],
)
def test_wrong_files_are_named(model, processor, tmp_path, files, message):
    write(tmp_path, **files)
    with pytest.raises(ValueError, match=message):
        write_card(model, processor, tmp_path, "user/tones")
    assert not (tmp_path / "README.md").exists()
