"""The model: everything that runs at inference. Only the installed package runs this file; remote code does not."""

from transformers import AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq, AutoProcessor

from seam.configuration_seam import SeamConfig  # registers "seam", which the model class looks up
from seam.processing_seam import SeamProcessor

from .modeling_seam import SeamForSpeechRecognition

for auto_class in (AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq):
    auto_class.register(SeamConfig, SeamForSpeechRecognition, exist_ok=True)
AutoProcessor.register(SeamConfig, SeamProcessor, exist_ok=True)

__all__ = ["SeamConfig", "SeamForSpeechRecognition", "SeamProcessor", "load_checkpoint"]


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
