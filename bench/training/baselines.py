"""The baselines of SEAM's stages: transformers' fine-tuning of a Whisper, and PEFT's LoRA, at equal sizes."""

from collections.abc import Callable

import soundfile
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from seam.bench.training.training_setup import Setting, Sizes, make_feature_extractor, make_tokenizer
from seam.experiments import tiny_backbones


def whisper_baseline(
    sizes: Sizes, tokenizer: PreTrainedTokenizerFast, trains_table: bool
) -> WhisperForConditionalGeneration:
    """
    Make Stage 1's baseline: a Whisper whose encoder is frozen.

    Args:
        sizes: of the model.
        tokenizer: with the ids of start, end and padding.
        trains_table: whether the embedding table of the decoder is trained, as fine-tuning does. The aligner has none:
            without it both train equally many layers.
    """
    config = WhisperConfig(**sizes.whisper.to_dict())
    start, end = tokenizer.convert_tokens_to_ids([tiny_backbones.START, tiny_backbones.END])
    config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = start, end, tokenizer.pad_token_id
    model = WhisperForConditionalGeneration(config)
    model.freeze_encoder()
    model.get_input_embeddings().requires_grad_(trains_table)
    return model


class WhisperData(Dataset):
    """
    Read recordings and labels for Whisper in every step, as Stage 1 does.

    Labels are the transcript and an end-of-sequence token, so that the decoder has as many positions as the aligner.
    """

    def __init__(self, setting: Setting):
        self.utterances = setting.utterances
        self.tokenizer = make_tokenizer()
        self.feature_extractor = make_feature_extractor(setting.sizes)

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        utterance = self.utterances[index]
        waveform, rate = soundfile.read(utterance.audio, dtype="float32")
        features = self.feature_extractor(waveform, sampling_rate=rate, return_tensors="pt").input_features[0]
        labels = [*self.tokenizer(utterance.text.lower()).input_ids, self.tokenizer.eos_token_id]
        return {"input_features": features, "labels": torch.tensor(labels)}


def collate_whisper(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack features and pad labels with -100."""
    return {
        "input_features": torch.stack([item["input_features"] for item in items]),
        "labels": pad_sequence([item["labels"] for item in items], True, padding_value=-100),
    }


def whisper_trainer(setting: Setting, trains_table: bool) -> Callable[[], Trainer]:
    """Build transformers' own fine-tuning of a Whisper with a frozen encoder."""
    model, dataset = whisper_baseline(setting.sizes, make_tokenizer(), trains_table), WhisperData(setting)
    return lambda: Seq2SeqTrainer(
        model=model,
        args=setting.arguments(Seq2SeqTrainingArguments),
        data_collator=collate_whisper,
        train_dataset=dataset,
    )


def peft_baseline(sizes: Sizes) -> PeftModel:
    """Make Stage 2's baseline: the language model with the same LoRA."""
    fields = sizes.fields
    lora = LoraConfig(
        r=fields["lora_rank"],
        lora_alpha=fields["lora_alpha"],
        lora_dropout=fields["lora_dropout"],
        target_modules=fields["lora_target_modules"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(AutoModelForCausalLM.from_config(sizes.llm), lora)


class ChatData(Dataset):
    """
    Make chats for the language model alone, with as many tokens as Stage 2 has positions.

    The prompt holds the transcript where Stage 2 has the aligner's embeddings. The reply, which alone has labels, is
    the transcript with the end of the turn.
    """

    def __init__(self, setting: Setting):
        prompt = setting.processor.prompt_ids()
        audio = prompt.index(setting.processor.audio_token_id)
        self.before, self.after = prompt[:audio], prompt[audio + 1 :]
        self.texts = [utterance.text.lower() for utterance in setting.utterances]
        self.tokenizer = make_tokenizer()

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        transcript = self.tokenizer(self.texts[index]).input_ids
        prompt, reply = [*self.before, *transcript, *self.after], [*transcript, self.tokenizer.eos_token_id]
        ids = prompt + reply
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + reply}


def peft_trainer(setting: Setting) -> Callable[[], Trainer]:
    """Build PEFT's own LoRA fine-tuning of the language model."""
    model, dataset = peft_baseline(setting.sizes), ChatData(setting)
    return lambda: Trainer(
        model=model,
        args=setting.arguments(),
        data_collator=DataCollatorForSeq2Seq(dataset.tokenizer),
        train_dataset=dataset,
    )
