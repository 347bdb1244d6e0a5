"""Qwen's real tokenizer, from the ranks of its vocabulary alone."""

import base64
from pathlib import Path

from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

# One line a token: its bytes in base64, and its rank. From the PyPI package `dashscope`, dashscope/resources/.
RANKS = Path(__file__).resolve().parents[2] / ".venv" / "qwen.tiktoken"
START, END = "<|im_start|>", "<|im_end|>"


def load_ranks(path: Path) -> dict[bytes, int]:
    """Bytes of each token to its id."""
    lines = path.read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


def split_in_two(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two tokens that byte-pair encoding joined last to make this one."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:], strict=False)]
        place = pairs.index(min(pairs))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def load_tokenizer(ranks: dict[bytes, int]) -> Qwen2Tokenizer:
    """Return transformers' class with its pre-tokenization and, after the ranks, the checkpoints' special tokens."""
    letters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    merges = [tuple(map(spell, split_in_two(token, ranks))) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    return tokenizer
