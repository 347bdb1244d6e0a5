"""The model card: `model_card.md` filled in by huggingface_hub from result files, never by hand."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).parents[1] / "model_card.md"


def write_card(model, processor, folder: Path, training_data: str, results: str) -> None:
    """
    Write the card of a checkpoint as `README.md`, the name under which the Hub shows it.

    Args:
        model, processor: the checkpoint.
        folder: where it is saved.
        training_data: a sentence or two.
        results: Markdown.
    """
    parts = {name: getattr(model, name) for name in ("encoder", "aligner", "language_model")}
    card = ModelCard.from_template(
        ModelCardData(
            language="en",
            license="apache-2.0",
            library_name="transformers",
            pipeline_tag="automatic-speech-recognition",
            tags=["seam", "speech-llm"],
        ),
        template_path=str(TEMPLATE),
        title="SEAM, a tiny checkpoint",
        parameters={name: f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f}" for name, part in parts.items()},
        training_data=training_data,
        window_seconds=processor.max_seconds,
        results=results,
    )
    card.save(folder / "README.md")
