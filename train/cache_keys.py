"""
Cache keys: digests of the model, the data and the settings that a cache was computed from.

A cache file keeps its key, and is refused where the model, the data or the settings are others.
"""

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from seam.configuration_seam import SeamConfig
from seam.data.files import sha256_of
from seam.data.manifest import Utterance
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.modeling_seam.weights import fingerprint, sampled_fingerprint

# The settings that, with the weights, decide the features, the encoder's states and Stage 1's tokens.
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
# Settings of the same kind that came later.
WINDOW = ("speech_margin", "encoder_window")
TOKENS = ("token_projection", "mixture_size", "aligner_prompt")
# What an error says of an entry that differs.
DIFFERENCES = {
    "encoder": "another speech encoder",
    "features": "other features",
    "stage1": "another Stage 1",
    "utterances": "another number of utterances",
    "recordings": "other recordings",
    "casing": "another casing",
    "transcripts": "other transcripts or with another tokenizer",
    "llm_inputs": "other llm_inputs",
    "dtype": "another precision",
    "computed_in": "an encoder in another precision",
    "places": "shards of another size",
}
# Entries that are not digests: an error shows their values.
READABLE = ("utterances", "casing", "llm_inputs", "dtype", "computed_in", "places")
# What caches have that were made before they named it.
UNNAMED = {"computed_in": "float32"}
# Digests of all bytes. Caches that were made before have those of samples alone, under the names without the ending.
ALL_BYTES = "_bytes"


def _unless_default(config: SeamConfig, names: Sequence[str]) -> dict[str, Any]:
    """Return the settings that are not the defaults: those are in no key of the caches that were made before them."""
    defaults = {field.name: field.default for field in fields(SeamConfig)}
    return {name: getattr(config, name) for name in names if getattr(config, name) != defaults[name]}


def encoder_key(model: SeamForSpeechRecognition, processor: SeamProcessor) -> dict[str, str]:
    """Return digests of the speech encoder, by its weights and settings, and of the settings of its features."""
    settings = {name: getattr(model.config.audio_config, name, None) for name in ENCODER}
    settings |= _unless_default(model.config, WINDOW)
    features = {name: getattr(processor.feature_extractor, name, None) for name in FEATURES}
    return {
        "encoder": sha256_of(
            [[sampled_fingerprint(model.encoder.state_dict()), settings, model.config.mask_speech_padding]]
        ),
        "features": sha256_of([features]),
        f"encoder{ALL_BYTES}": fingerprint(model.encoder.state_dict()),
    }


def stage1_key(model: SeamForSpeechRecognition, processor: SeamProcessor) -> dict[str, str]:
    """
    Return digests of everything that Stage 1's tokens depend on.

    Of the LLM that is the embedding table alone, so that a checkpoint of Stage 1 and that of Stage 2 after it have the
    same key. They do not depend on the draft head either, whose tokens the aligner checks.
    """
    # The bridge was called so when the first caches were made: their digests still hold.
    tensors = {f"aligner.{name}": tensor for name, tensor in model.bridge.state_dict().items()}
    tensors["embeddings"] = model.lookup.table.float()  # the same key for every precision that the LLM is kept in
    settings = [
        {name: getattr(model.config, name) for name in STAGE_1},
        {name: getattr(model.config.aligner_config, name, None) for name in ALIGNER},
    ]
    settings[0] |= _unless_default(model.config, TOKENS)
    return {
        **encoder_key(model, processor),
        "stage1": sha256_of([[sampled_fingerprint(tensors), settings]]),
        f"stage1{ALL_BYTES}": fingerprint(tensors),
    }


def recordings_key(utterances: Sequence[Utterance]) -> dict[str, Any]:
    """
    Return the number of the recordings and a digest of their paths and durations, in order.

    Paths are relative to the folder that holds them all, which may be moved.
    """
    folders = [os.path.abspath(utterance.audio.parent) for utterance in utterances]
    common = os.path.commonpath(folders)
    rows = [
        [Path(os.path.relpath(folder, common), utterance.audio.name).as_posix(), utterance.duration]
        for folder, utterance in zip(folders, utterances, strict=True)
    ]
    return {"utterances": len(utterances), "recordings": sha256_of([rows])}


def transcripts_key(transcripts: Sequence[Sequence[int]], casing: str) -> dict[str, str]:
    """
    Return the transcripts' casing and a digest of their ids.

    Args:
        transcripts: token ids of each.
        casing: one of `seam.data.manifest.CASINGS`.
    """
    return {"casing": casing, "transcripts": sha256_of([[list(ids) for ids in transcripts]])}


def check_key(path: Path, kept: dict[str, Any], key: dict[str, Any]) -> None:
    """
    Check that a cache file was computed from the present model, data and settings.

    Args:
        path: of the file.
        kept: the key that the file keeps.
        key: the present one.

    Raises:
        ValueError: for the first entry that differs.
    """
    for name, value in key.items():
        own = kept.get(name, value if name.endswith(ALL_BYTES) else UNNAMED.get(name))
        if own != value:
            values, name = f" ({own}, now {value})" if name in READABLE else "", name.removesuffix(ALL_BYTES)
            raise ValueError(
                f"{path} is stale: it was made from {DIFFERENCES[name]}{values}. Delete it or give another folder."
            )
