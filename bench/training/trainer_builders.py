"""
Builders of the trainers that are compared: those of SEAM's stages and of their baselines.

All get the same recordings in the same order, batch size, optimizer and precision; each loads and collates data as its
own library does.
"""

from collections.abc import Callable
from functools import partial

from transformers import Trainer

from seam.bench.training.baselines import peft_trainer, whisper_trainer
from seam.bench.training.training_setup import Setting
from seam.data.dataset import SpeechCollator, SpeechDataset
from seam.data.manifest import CASINGS
from seam.modeling_seam import SeamForSpeechRecognition
from seam.train.alignment import AlignmentTrainer
from seam.train.instruction import InstructionTrainer
from seam.train.recipe import DataSettings, StageRecipe
from seam.train.refinement import AlignedDataset, RefinementTrainer
from seam.train.state_cache import CachedStates, cached_aligned_embeds, cached_encoder_states
from seam.train.trainer import StageTrainer

# Makes a model and returns a function that makes a new trainer of it in every call.
Builder = Callable[[Setting], Callable[[], Trainer]]


def stage_trainer(
    trainer_class: type[StageTrainer],
    setting: Setting,
    load_data: Callable[[Setting, SeamForSpeechRecognition], SpeechDataset | CachedStates],
) -> Callable[[], Trainer]:
    """
    Build the trainer of a stage.

    Args:
        trainer_class: of the stage.
        setting: of the run.
        load_data: `speech`, which is read and encoded in every step, or `encoder_states` or `aligned_embeds` on disk.
    """
    model = setting.model if trainer_class.use_llm else setting.alignment_model
    dataset = load_data(setting, model)
    if trainer_class is RefinementTrainer:  # labels in place of Stage-1 tokens: random weights never predict EOA
        transcripts = map(speech(setting).token_ids, range(len(dataset)))
        dataset = AlignedDataset(dataset, [(index, ids, ids) for index, ids in enumerate(transcripts)])

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
    """Return the utterances as features and labels."""
    return SpeechDataset(setting.utterances, setting.processor, CASINGS["lower"])


def encoder_states(setting: Setting, model: SeamForSpeechRecognition) -> CachedStates:
    """Return the cached states of `data.encoder_states`; those that are missing are computed first."""
    dtype = str(setting.sizes.dtype).removeprefix("torch.")
    # A folder for each: how long Stage 1 takes to fill its cache is measured, so that it must start empty.
    folder = setting.folder / ("states of Stage 1" if model.config.alignment_only else "states")
    data = DataSettings(encoder_states=str(folder), encoder_states_dtype=dtype)
    recipe = StageRecipe(training=setting.arguments(), data=data)
    held_out = SpeechDataset(setting.utterances[:1], setting.processor, CASINGS["lower"])  # as recipes have one
    return cached_encoder_states(recipe, model, setting.processor, [speech(setting), held_out])[0]


def aligned_embeds(setting: Setting, model: SeamForSpeechRecognition) -> CachedStates:
    """Return the cached embeddings of `aligned_embeds`; those that are missing are computed first."""
    recipe = StageRecipe(
        training=setting.arguments(), data=DataSettings(), aligned_embeds=str(setting.folder / "aligned")
    )
    return cached_aligned_embeds(recipe, model, setting.processor, speech(setting), "train", setting.utterances)


BUILDERS: dict[str, Builder] = {
    "stage_1": partial(stage_trainer, AlignmentTrainer, load_data=speech),
    "stage_1_cached": partial(stage_trainer, AlignmentTrainer, load_data=encoder_states),
    "whisper": partial(whisper_trainer, trains_table=False),
    "whisper_with_table": partial(whisper_trainer, trains_table=True),
    "stage_2": partial(stage_trainer, InstructionTrainer, load_data=speech),
    "stage_2_with_states": partial(stage_trainer, InstructionTrainer, load_data=encoder_states),
    "stage_2_cached": partial(stage_trainer, InstructionTrainer, load_data=aligned_embeds),
    "peft": peft_trainer,
    "stage_3": partial(stage_trainer, RefinementTrainer, load_data=speech),
}
