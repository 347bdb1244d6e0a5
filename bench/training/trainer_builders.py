"""
Trainings of SEAM's stages and of their peers, side by side: the same recordings in the same order, the same batch,
optimizer and precision. Each reads, collates and trains as its own library does it.
"""

from collections.abc import Callable
from functools import partial

from transformers import Trainer

from seam.bench.training.baselines import peft, whisper
from seam.bench.training.training_setup import Setting
from seam.data.dataset import SpeechCollator, SpeechDataset
from seam.data.manifest import CASINGS
from seam.modeling_seam import SeamForSpeechRecognition
from seam.train.alignment import AlignmentTrainer
from seam.train.instruction import InstructionTrainer
from seam.train.recipe import DataSettings, StageRecipe
from seam.train.refinement import AlignedDataset, RefinementTrainer
from seam.train.state_cache import States, aligned_on_disk, states_on_disk
from seam.train.trainer import StageTrainer

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
