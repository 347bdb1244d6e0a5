"""What runs at inference. This file is the installed face; remote code loads `modeling_seam.py` itself."""

from transformers import AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq, AutoProcessor

from seam.configuration_seam import SeamConfig  # registers "seam", which the model class looks up
from seam.processing_seam import SeamProcessor

from .modeling_seam import SeamForSpeechRecognition

for auto_class in (AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq):
    auto_class.register(SeamConfig, SeamForSpeechRecognition, exist_ok=True)
AutoProcessor.register(SeamConfig, SeamProcessor, exist_ok=True)

__all__ = ["SeamConfig", "SeamForSpeechRecognition", "SeamProcessor"]
