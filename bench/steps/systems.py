"""
Trainings of SEAM's stages and of their peers, side by side: the same recordings in the same order, the same batch,
optimizer and precision. Each reads, collates and trains as its own library does it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from seam.bench.steps import models
from seam.data.dataset import SpeechCollator, SpeechDataset
from seam.data.manifest import CASINGS, Utterance
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.train.alignment import AlignmentTrainer
from seam.train.instruction import InstructionTrainer
from seam.train.recipe import DataSettings, StageRecipe
from seam.train.refinement import AlignedDataset, RefinementTrainer
from seam.train.state_cache import States, aligned_on_disk, states_on_disk
from seam.train.trainer import StageTrainer


@dataclass
class Setting:
    """
    Args:
        size: one of `models.SIZES`.
        device: `cpu` or `cuda`.
        batch: utterances of a step of one process.
        steps: of a training.
        utterances: what is heard, as many as the steps take.
        folder: to write to.
    """

    size: str
    device: str
    batch: int
    steps: int
    utterances: list[Utterance]
    folder: Path

    @cached_property
    def sizes(self) -> models.Sizes:
        return models.sizes_of(self.size)

    @cached_property
    def processor(self) -> SeamProcessor:
        return models.processor(self.sizes)

    @cached_property
    def alignment_model(self) -> SeamForSpeechRecognition:
        """Of all systems that train Stage 1."""
        return models.seam(self.sizes, self.processor, alignment_only=True).to(self.device)

    @cached_property
    def model(self) -> SeamForSpeechRecognition:
        """Of all systems that train Stages 2 and 3."""
        return models.seam(self.sizes, self.processor, alignment_only=False).to(self.device)

    def arguments(self, cls: type[TrainingArguments] = TrainingArguments) -> TrainingArguments:
        """With the optimizer of our recipes."""
        return cls(
            output_dir=str(self.folder / "training"),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch,
            learning_rate=5e-4,
            weight_decay=0.01,
            max_grad_norm=1.0,
            warmup_steps=2000,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            bf16=self.sizes.dtype == torch.bfloat16,
            use_cpu=self.device == "cpu",
            # On a CPU all cores compute: what reads in another process takes as much from them.
            dataloader_num_workers=8 if self.device == "cuda" else 0,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )


# Builds a model, and returns what makes a trainer of it, as often as it is called.
Builder = Callable[[Setting], Callable[[], Trainer]]


# ---- SEAM ----


def stage(
    trainer_class: type[StageTrainer],
    setting: Setting,
    read: Callable[[Setting, SeamForSpeechRecognition], SpeechDataset | States],
) -> Callable[[], Trainer]:
    """
    Args:
        read: what makes the data set: of speech, which is read and encoded in every step, or of what is on disk.
    """
    model = setting.model if trainer_class.use_llm else setting.alignment_model
    dataset = read(setting, model)
    if trainer_class is RefinementTrainer:  # as if Stage 1 had heard everything right: random weights hear no end
        transcripts = map(speech(setting).token_ids, range(len(dataset)))
        dataset = AlignedDataset(dataset, [(place, ids, ids) for place, ids in enumerate(transcripts)])

    def trainer() -> Trainer:
        return trainer_class(
            model=model,
            args=setting.arguments(),
            data_collator=SpeechCollator(setting.processor),
            train_dataset=dataset,
            processor=setting.processor,
            validation=[],
            data=DataSettings(),
        )

    return trainer


def speech(setting: Setting, model: SeamForSpeechRecognition | None = None) -> SpeechDataset:
    return SpeechDataset(setting.utterances, setting.processor, CASINGS["lower"])


def encoder_states(setting: Setting, model: SeamForSpeechRecognition) -> States:
    """`data.encoder_states`; what is not there yet is made now."""
    dtype = str(setting.sizes.dtype).removeprefix("torch.")
    # Stage 1 times how its own are made: they are not those that Stage 2 may have left.
    folder = setting.folder / ("states of Stage 1" if model.config.alignment_only else "states")
    data = DataSettings(encoder_states=str(folder), encoder_states_dtype=dtype)
    recipe = StageRecipe(training=setting.arguments(), data=data)
    one = SpeechDataset(setting.utterances[:1], setting.processor, CASINGS["lower"])  # held out, as recipes have it
    return states_on_disk(recipe, model, setting.processor, [speech(setting), one])[0]


def aligned_embeds(setting: Setting, model: SeamForSpeechRecognition) -> States:
    """`aligned_embeds`; what is not there yet is made now."""
    recipe = StageRecipe(
        training=setting.arguments(), data=DataSettings(), aligned_embeds=str(setting.folder / "aligned")
    )
    return aligned_on_disk(recipe, model, setting.processor, speech(setting), "train", setting.utterances)


# ---- Stage 1's peer ----


class WhisperData(Dataset):
    """
    Recordings for Whisper, read in every step, as Stage 1 reads them. Labels are the transcript and an end, as those of
    Stage 1: the decoder has as many positions.
    """

    def __init__(self, setting: Setting):
        self.utterances = setting.utterances
        self.tokenizer = models.tokenizer()
        self.feature_extractor = models.feature_extractor(setting.sizes)

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        utterance = self.utterances[index]
        waveform, rate = soundfile.read(utterance.audio, dtype="float32")
        features = self.feature_extractor(waveform, sampling_rate=rate, return_tensors="pt").input_features[0]
        labels = [*self.tokenizer(utterance.text.lower()).input_ids, self.tokenizer.eos_token_id]
        return {"input_features": features, "labels": torch.tensor(labels)}


def collate_whisper(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {
        "input_features": torch.stack([item["input_features"] for item in items]),
        "labels": pad_sequence([item["labels"] for item in items], True, padding_value=-100),
    }


def whisper(setting: Setting, trains_table: bool) -> Callable[[], Trainer]:
    """transformers' own fine-tuning of a Whisper with a frozen encoder; `trains_table`: see `models.whisper_peer`."""
    model, dataset = models.whisper_peer(setting.sizes, models.tokenizer(), trains_table), WhisperData(setting)
    return lambda: Seq2SeqTrainer(
        model=model,
        args=setting.arguments(Seq2SeqTrainingArguments),
        data_collator=collate_whisper,
        train_dataset=dataset,
    )


# ---- Stage 2's peer ----


class ChatData(Dataset):
    """
    Chats for the language model alone, of as many tokens as it reads in Stage 2: the prompt with the transcript in the
    place of the aligner's embeddings, and the transcript again with its end, of which the labels are.
    """

    def __init__(self, setting: Setting):
        prompt = setting.processor.prompt_ids()
        place = prompt.index(setting.processor.audio_token_id)
        self.before, self.after = prompt[:place], prompt[place + 1 :]
        self.texts = [utterance.text.lower() for utterance in setting.utterances]
        self.tokenizer = models.tokenizer()

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        transcript = self.tokenizer(self.texts[index]).input_ids
        prompt, reply = [*self.before, *transcript, *self.after], [*transcript, self.tokenizer.eos_token_id]
        ids = prompt + reply
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + reply}


def peft(setting: Setting) -> Callable[[], Trainer]:
    """PEFT's own LoRA fine-tuning of the language model."""
    model, dataset = models.peft_peer(setting.sizes), ChatData(setting)
    return lambda: Trainer(
        model=model,
        args=setting.arguments(),
        data_collator=DataCollatorForSeq2Seq(dataset.tokenizer),
        train_dataset=dataset,
    )


BUILDERS: dict[str, Builder] = {
    "stage_1": partial(stage, AlignmentTrainer, read=speech),
    "stage_1_cached": partial(stage, AlignmentTrainer, read=encoder_states),
    "whisper": partial(whisper, trains_table=False),
    "whisper_with_table": partial(whisper, trains_table=True),
    "stage_2": partial(stage, InstructionTrainer, read=speech),
    "stage_2_with_states": partial(stage, InstructionTrainer, read=encoder_states),
    "stage_2_cached": partial(stage, InstructionTrainer, read=aligned_embeds),
    "peft": peft,
    "stage_3": partial(stage, RefinementTrainer, read=speech),
}
