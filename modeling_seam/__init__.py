"""The model: everything that runs at inference. Only the installed package runs this file; remote code does not."""

from typing import Any

from transformers import AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq, AutoProcessor

from seam.configuration_seam import SeamConfig  # registers "seam", which the model class looks up
from seam.processing_seam import SeamProcessor

from .building import BoundaryTokens, choose_boundary_tokens
from .modeling_seam import SeamForSpeechRecognition

for auto_class in (AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq):
    auto_class.register(SeamConfig, SeamForSpeechRecognition, exist_ok=True)
AutoProcessor.register(SeamConfig, SeamProcessor, exist_ok=True)

__all__ = ["SeamConfig", "SeamForSpeechRecognition", "SeamProcessor", "build_untrained", "load_checkpoint"]


def load_checkpoint(name: str, **kwargs) -> tuple[SeamForSpeechRecognition, SeamProcessor]:
    """
    Load model and processor from a folder or a Hub id.

    Args:
        kwargs: of `SeamForSpeechRecognition.from_pretrained`.

    Raises:
        OSError: when the checkpoint cannot be found.
        ValueError: when it is no SEAM checkpoint, or an incomplete one.
    """
    try:
        model = SeamForSpeechRecognition.from_pretrained(name, **kwargs).eval()  # first: it names other architectures
        processor = SeamProcessor.from_pretrained(name)
    except OSError as error:
        raise OSError(f"cannot load the checkpoint {name!r}: {error}") from error
    processor.check_fits(model.config)
    return model, processor


# What an aligner that begins as Whisper's decoder does best with; see docs/FINDINGS.md.
UNTRAINED = {
    "token_projection": "table",
    "speech_margin": 4.0,
    "encoder_window": "audio",
    "alignment_reduction": "mean",
    "llm_inputs": "continuous",
}


def build_untrained(
    encoder: str, llm: str, language: str | None = None, **config
) -> tuple[SeamForSpeechRecognition, SeamProcessor, BoundaryTokens]:
    """
    Build a model that transcribes without training, from a Whisper with its decoder and a language model.

    Args:
        encoder, llm: Hub ids or folders.
        language: which the aligner expects by default, of a multilingual Whisper; English if none is given.
        config: fields of [`SeamConfig`] that differ from `UNTRAINED`.

    Returns:
        The model, its processor, and which tokens were chosen as `<BOA>` and `<EOA>`.

    Raises:
        OSError, ValueError: see `SeamForSpeechRecognition.from_backbones`.
    """
    tokens = choose_boundary_tokens(llm)
    processor = SeamProcessor.from_backbones(
        encoder, llm, boa_token=tokens.boa, eoa_token=tokens.eoa, leading_space=True
    )
    settings: dict[str, Any] = UNTRAINED | config
    model = SeamForSpeechRecognition.from_backbones(encoder, llm, processor, language=language, **settings)
    return model.eval(), processor, tokens
