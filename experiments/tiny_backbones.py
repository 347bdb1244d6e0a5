"""
Make the backbones of the demo offline: a tiny Whisper, a tiny Qwen3 and their tokenizer, of the real classes.

They stand in for a user's pretrained checkpoints, so that the whole method can be trained and tested from nothing. They
are saved as ordinary folders, which the stages load like any backbone from the Hub.
"""

import copy
import random
import string
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from huggingface_hub.dataclasses import strict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.utils import ModelOutput

from seam.modeling_seam.saving import follow_umask

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHARACTERS = string.ascii_lowercase + "' "
MEL_FRAMES_PER_SECOND = 100


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `texts`, with Qwen's special tokens and chat format."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD, padding_side="left")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_whisper(
    tokenizer: PreTrainedTokenizerFast, window_seconds: int, **sizes
) -> tuple[WhisperForConditionalGeneration, WhisperFeatureExtractor]:
    """
    Make a randomly initialised Whisper and its feature extractor.

    Args:
        tokenizer: of the decoder.
        window_seconds: length of the encoder's window.
        sizes: fields of `WhisperConfig`.
    """
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        max_source_positions=window_seconds * MEL_FRAMES_PER_SECOND // 2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=start,
        eos_token_id=end,
        decoder_start_token_id=start,
        begin_suppress_tokens=None,
        **sizes,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
        max_length=config.max_target_positions,
        num_beams=1,
    )
    return model, WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=window_seconds)


def make_qwen3(tokenizer: PreTrainedTokenizerFast, **sizes) -> Qwen3ForCausalLM:
    """Make a randomly initialised Qwen3 with tied embeddings; `sizes` are fields of `Qwen3Config`."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


class WhisperWithCTC(nn.Module):
    """
    Whisper with two auxiliary CTC heads on its encoder, over characters and over tokens, discarded after training.

    They make the encoder learn sounds and words rather than memorise sentences.

    Args:
        whisper: trained in place.
        ctc_weight: weight of the two CTC losses against the decoder's cross-entropy.
    """

    def __init__(self, whisper: WhisperForConditionalGeneration, ctc_weight: float = 0.5):
        super().__init__()
        self.whisper = whisper
        self.ctc_weight = ctc_weight
        self.character_head = nn.Linear(whisper.config.d_model, len(CHARACTERS) + 1)
        self.token_head = nn.Linear(whisper.config.d_model, whisper.config.vocab_size + 1)

    def forward(self, input_features, attention_mask, labels, characters) -> ModelOutput:
        """
        Return the weighted sum of the decoder's cross-entropy and the CTC losses.

        Args:
            input_features (`torch.FloatTensor` of shape `(batch, n_mels, frames)`): of the encoder.
            attention_mask (`torch.LongTensor` of shape `(batch, frames)`): 1 within the audio.
            labels (`torch.LongTensor` of shape `(batch, tokens)`): transcript ids and the end token, padded with -100.
            characters (`torch.LongTensor` of shape `(batch, letters)`): indices into `CHARACTERS`, padded with -100.
        """
        output = self.whisper(input_features, attention_mask=attention_mask, labels=labels)
        states = output.encoder_last_hidden_state
        lengths = self.whisper._get_feat_extract_output_lengths(attention_mask.sum(-1))
        tokens = labels.masked_fill(labels == self.whisper.config.eos_token_id, -100)
        ctc = sum(
            self._ctc(head(states), lengths, targets)
            for head, targets in ((self.character_head, characters), (self.token_head, tokens))
        )
        return ModelOutput(loss=(1 - self.ctc_weight) * output.loss + self.ctc_weight * ctc / 2)

    @staticmethod
    def _ctc(logits: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the CTC loss per target symbol; the blank is the last class."""
        is_target = targets != -100
        return nn.functional.ctc_loss(
            logits.float().log_softmax(-1).transpose(0, 1),
            targets[is_target],
            lengths,
            is_target.sum(-1),
            blank=logits.shape[-1] - 1,
            zero_infinity=True,
        )


def character_ids(text: str) -> torch.LongTensor:
    """Return the indices of a text's characters in `CHARACTERS`; any others are left out."""
    return torch.tensor([CHARACTERS.index(c) for c in text.lower() if c in CHARACTERS], dtype=torch.long)


def train_whisper(
    whisper: WhisperForConditionalGeneration, dataset: Dataset, tokenizer, arguments: TrainingArguments
) -> float:
    """
    Train a Whisper in place on items of a [`SpeechDataset`], with SpecAugment if its config asks for it.

    Returns:
        The mean training loss.
    """
    end = torch.tensor([whisper.config.eos_token_id])

    def collate(items):
        letters = [character_ids(tokenizer.decode(item["token_ids"])) for item in items]
        return {
            "input_features": torch.stack([item["input_features"] for item in items]),
            "attention_mask": torch.stack([item["attention_mask"] for item in items]),
            "labels": pad_sequence([torch.cat([i["token_ids"], end]) for i in items], True, padding_value=-100),
            "characters": pad_sequence(letters, True, padding_value=-100),
        }

    model = WhisperWithCTC(whisper)
    return _train(model, arguments, collate, dataset)


@strict
@dataclass
class TaskShares:
    """
    The shares of the tasks that a tiny language model is trained on; in the remaining share it corrects sentences.

    Args:
        plain: plain sentences.
        tokens, words, repeat: chats in which it repeats random tokens, random words, or sentences.
        corruption: least and greatest share of wrong words in the sentences that it corrects, drawn for each sentence;
            by default about every sixth word is wrong.
    """

    plain: float = 0.25
    tokens: float = 0.15
    words: float = 0.15
    repeat: float = 0.2
    corruption: list[float] | None = None


class TextTasks(Dataset):
    """
    Training examples of the tiny language model: plain sentences, and chats in which it repeats or corrects text.

    Of chats it learns the replies only. It learns to copy from the chats that repeat random tokens.

    Args:
        tokenizer: with a chat template.
        sentences: the text of every domain.
        size: number of examples of one epoch.
        seed: of what is drawn.
        shares: see [`TaskShares`].
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        sentences: list[str],
        size: int,
        seed: int,
        shares: TaskShares | None = None,
    ):
        self.shares = shares or TaskShares()
        self.tokenizer = tokenizer
        self.sentences = sentences
        self.size = size
        self.seed = seed
        special = set(tokenizer.all_special_ids)
        self.plain_ids = [i for i in range(len(tokenizer)) if i not in special]
        self.words = sorted({word for sentence in sentences for word in sentence.split()})
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "\0"}], add_generation_prompt=True, tokenize=False
        )
        self.before, self.after = chat.split("\0")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.LongTensor]:
        rng = random.Random(f"{self.seed}-{index}")
        sentence, task = rng.choice(self.sentences), rng.random()
        shares = self.shares
        plain, tokens_end, words_end, repeat_end = accumulate(
            (shares.plain, shares.tokens, shares.words, shares.repeat)
        )
        if task < plain:
            ids = [*self._ids(sentence), self.tokenizer.eos_token_id]
            return {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}
        if task < tokens_end:
            tokens = rng.choices(self.plain_ids, k=rng.randint(1, 12))
            return self._chat("Repeat the following:", tokens, tokens)
        if task < words_end:
            tokens = self._ids(" ".join(rng.choices(self.words, k=rng.randint(1, 8))))
            return self._chat("Repeat the following:", tokens, tokens)
        if task < repeat_end:
            return self._chat("Repeat the following:", self._ids(sentence), self._ids(sentence))
        return self._chat("Correct the following:", self._ids(self._corrupt(sentence, rng)), self._ids(sentence))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids

    def _chat(self, request: str, given: list[int], reply: list[int]) -> dict[str, torch.LongTensor]:
        prompt = [*self._ids(self.before + request), *given, *self._ids(self.after)]
        reply = [*reply, self.tokenizer.eos_token_id]
        return {"input_ids": torch.tensor(prompt + reply), "labels": torch.tensor([-100] * len(prompt) + reply)}

    def _corrupt(self, sentence: str, rng: random.Random) -> str:
        """Substitute, delete or insert words at random."""
        if self.shares.corruption is None:
            substituted, deleted, inserted = 0.10, 0.14, 0.17
        else:
            rate = rng.uniform(*self.shares.corruption)
            substituted, deleted, inserted = 0.6 * rate, 0.9 * rate, rate
        words = []
        for word in sentence.split():
            chance = rng.random()
            if chance < substituted:
                words.append(rng.choice(self.words))
            elif chance < deleted:
                continue
            elif chance < inserted:
                words += [word, rng.choice(self.words)]
            else:
                words.append(word)
        return " ".join(words) or sentence


def train_qwen3(model: Qwen3ForCausalLM, dataset: TextTasks, arguments: TrainingArguments) -> float:
    """Train a Qwen3 in place on [`TextTasks`] and return the mean training loss."""
    pad = model.config.pad_token_id

    def collate(items):
        ids = pad_sequence([item["input_ids"] for item in items], True, padding_value=pad)
        labels = pad_sequence([item["labels"] for item in items], True, padding_value=-100)
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        }

    return _train(model, arguments, collate, dataset)


def _train(model: nn.Module, arguments: TrainingArguments, collate, dataset: Dataset) -> float:
    """Train, and return the mean loss."""
    arguments = copy.copy(arguments)
    arguments.dataloader_pin_memory &= torch.accelerator.is_available()  # torch warns where there is nothing to pin for
    return Trainer(model=model, args=arguments, data_collator=collate, train_dataset=dataset).train().training_loss


def save_backbone(folder: str | Path, model, *processors) -> str:
    """Save a model with its tokenizer and, if it has one, its feature extractor, and return the folder."""
    for component in (model, *processors):
        component.save_pretrained(folder)
    follow_umask(Path(folder))
    return str(folder)
