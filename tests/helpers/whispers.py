"""A tiny multilingual Whisper with a vocabulary of its own, as `openai/whisper-*` are laid out."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from seam.experiments import tiny_backbones

START, END, WITHOUT_TIMES = "<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"
LANGUAGES = ["<|en|>", "<|de|>", "<|fr|>"]
TASKS = ["<|transcribe|>", "<|translate|>"]
TEXTS = ["the music in the old kitchen", "three goats on the hay", "turn the light off please", "Öl für Zürich"]


def make_tokenizer(vocab_size: int = 310) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with Whisper's special tokens after the others."""
    tokenizer = tiny_backbones.make_tokenizer(TEXTS * 20, vocab_size)
    tokenizer.add_special_tokens({"additional_special_tokens": [START, *LANGUAGES, *TASKS, WITHOUT_TIMES]})
    tokenizer.eos_token = END
    return tokenizer


def save_whisper(folder: Path, tokenizer: PreTrainedTokenizerFast, seconds: int, seed: int = 0, **sizes) -> str:
    """Save a random Whisper with the generation config of a multilingual one; returns its folder."""
    torch.manual_seed(seed)
    whisper, feature_extractor = tiny_backbones.make_whisper(tokenizer, seconds, **sizes)
    whisper.get_decoder().embed_positions.weight.data.mul_(4)  # or it would repeat itself
    ids = tokenizer.convert_tokens_to_ids
    special = {"decoder_start_token_id": ids(START), "eos_token_id": ids(END), "pad_token_id": ids(END)}
    for config in (whisper.config, whisper.generation_config):
        for name, value in special.items():
            setattr(config, name, value)
    settings = whisper.generation_config
    settings.lang_to_id = {token: ids(token) for token in LANGUAGES}
    settings.task_to_id = {token.strip("<|>"): ids(token) for token in TASKS}
    settings.no_timestamps_token_id = ids(WITHOUT_TIMES)
    settings.is_multilingual = True
    return tiny_backbones.save_backbone(folder, whisper, tokenizer, feature_extractor)
