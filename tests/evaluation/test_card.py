"""The card is filled from what is given, and is one that the Hub's own client reads."""

from huggingface_hub import ModelCard

from seam.evaluation.card import write_card


def test_card(model, processor, tmp_path):
    write_card(model, processor, tmp_path, "Sounds of four lengths.", "| WER |\n|---|\n| 12.3 |")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "automatic-speech-recognition" and card.data.license == "apache-2.0"
    assert "| 12.3 |" in card.text and "Sounds of four lengths." in card.text and "windows of 2 s" in card.text
    assert "{{" not in card.text
    encoder = sum(parameter.numel() for parameter in model.encoder.parameters())
    assert f"{encoder / 1e6:.2f}M parameters" in card.text
