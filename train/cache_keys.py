"""What caches are made from, so that one is used for nothing else: model, data and settings, by digests."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seam.data.manifest import Utterance
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.modeling_seam.weights import fingerprint

# Beside the weights, what decides the features, the encoder's states and the tokens that Stage 1 writes.
FEATURES = ("feature_size", "sampling_rate", "hop_length", "n_fft", "chunk_length", "padding_value", "dither")
ENCODER = ("encoder_attention_heads", "activation_function", "scale_embedding")
ALIGNER = ("decoder_attention_heads", "activation_function")
STAGE_1 = (
    "bridge",
    "bridge_config",
    "boa_token_id",
    "eoa_token_id",
    "lookup_excluded_ids",
    "active_vocabulary",
    "alignment_lambda",
    "alignment_reduction",
    "mask_speech_padding",
)
# In words, for a message.
WORDS = {
    "encoder": "another speech encoder",
    "features": "other features",
    "stage1": "another Stage 1",
    "utterances": "another number of utterances",
    "recordings": "other recordings",
    "casing": "another casing",
    "transcripts": "other transcripts or with another tokenizer",
    "llm_inputs": "other llm_inputs",
    "dtype": "another precision",
    "places": "shards of another size",
}
# Of these the values themselves are told; the rest are digests.
TOLD = ("utterances", "casing", "llm_inputs", "dtype", "places")


def of_states(model: SeamForSpeechRecognition, processor: SeamProcessor) -> dict[str, str]:
    """The speech encoder by its weights and settings, and the features that it is given."""
    settings = {name: getattr(model.config.audio_config, name, None) for name in ENCODER}
    features = {name: getattr(processor.feature_extractor, name, None) for name in FEATURES}
    return {
        "encoder": _digest([fingerprint(model.encoder.state_dict()), settings, model.config.mask_speech_padding]),
        "features": _digest(features),
    }


def of_stage1(model: SeamForSpeechRecognition, processor: SeamProcessor) -> dict[str, str]:
    """
    All that has a part in what Stage 1 writes. The LLM beyond its embedding table has none: the checkpoint of Stage 1
    and that of Stage 2 after it are the same here. Nor has the draft head, whose tokens the aligner checks.
    """
    tensors = {f"aligner.{name}": tensor for name, tensor in model.aligner.state_dict().items()}
    tensors["embeddings"] = model.lookup.table.float()  # the same, in whatever precision the LLM is held
    settings = [
        {name: getattr(model.config, name) for name in STAGE_1},
        {name: getattr(model.config.aligner_config, name, None) for name in ALIGNER},
    ]
    return {**of_states(model, processor), "stage1": _digest([fingerprint(tensors), settings])}


def of_recordings(utterances: Sequence[Utterance]) -> dict[str, Any]:
    """Recordings in their order, by path and duration; all of them may lie elsewhere than they did, together."""
    folders = [os.path.abspath(utterance.audio.parent) for utterance in utterances]
    common = os.path.commonpath(folders)
    rows = [
        [Path(os.path.relpath(folder, common), utterance.audio.name).as_posix(), utterance.duration]
        for folder, utterance in zip(folders, utterances, strict=True)
    ]
    return {"utterances": len(utterances), "recordings": _digest(rows)}


def of_transcripts(transcripts: Sequence[Sequence[int]], casing: str) -> dict[str, str]:
    """
    Args:
        transcripts: the ids of each.
        casing: the name of the one that they are in.
    """
    return {"casing": casing, "transcripts": _digest([list(ids) for ids in transcripts])}


def check(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `ValueError` for a cache that was made from anything else than what is there now."""
    for key, value in now.items():
        if before.get(key) != value:
            told = f" ({before.get(key)}, now {value})" if key in TOLD else ""
            raise ValueError(f"{path} is stale: it was made from {WORDS[key]}{told}. Delete it or give another folder.")


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
