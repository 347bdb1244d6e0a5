"""What stages and draft share: reading the data, the word error rate on a held-out split, and the run itself."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments, set_seed

from seam.data.batching import SpeechCollator, SpeechDataset, keep_encoder_states
from seam.data.length_batches import LengthBatches
from seam.data.manifest import CASINGS, Utterance, read_manifest
from seam.data.streaming import SpeechStream
from seam.evaluation.scoring import word_errors
from seam.evaluation.transcription import load_checkpoint, transcribe
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.train.checkpoints import find_checkpoint, origin, written_aside
from seam.train.encoder_states import states_on_disk
from seam.train.epochs import SetEpoch, StartStream
from seam.train.recipe import DataSettings, RecipeError, StageRecipe
from seam.train.resuming import ResumableTrainer
from seam.train.training_data import length_batches, longest_transcript, skipped_audio, training_data


class StageTrainer(ResumableTrainer, ABC):
    """
    The trainer of one stage of SEAM, or of its draft. Beside the loss, `evaluate` reports the word error rate of the
    held-out utterances, decoded as a user would decode them.

    Args:
        processor ([`SeamProcessor`]): saved with every checkpoint.
        validation (`list[Utterance]`): held-out utterances for the word error rate.
        data (`DataSettings`): casing and batch size of the decoding.
        batches (`LengthBatches`, *optional*): of the training data, instead of batches of one size in random order.
        kwargs: of `ResumableTrainer`.
    """

    use_llm: bool

    def __init__(
        self,
        *,
        processor,
        validation: list[Utterance],
        data: DataSettings,
        args: TrainingArguments,
        batches: LengthBatches | None = None,
        **kwargs,
    ):
        self.validation = validation
        self.batches = batches
        self.data = data
        args.remove_unused_columns = False  # items are not the arguments of `forward`; the collator makes those
        super().__init__(args=args, processing_class=processor, **kwargs)
        drawn = [one for one in (self.train_dataset, batches) if hasattr(one, "set_epoch")]
        self.add_callback(SetEpoch(*drawn))
        if isinstance(self.train_dataset, SpeechStream):
            self.add_callback(StartStream(self.train_dataset))
        self.model.requires_grad_(False)
        for parameter in self.trained_parameters(self.model):
            parameter.requires_grad_(True)

    @staticmethod
    @abstractmethod
    def trained_parameters(model: SeamForSpeechRecognition) -> list[torch.nn.Parameter]:
        """The parameters that this stage trains; all others stay frozen."""

    @staticmethod
    def settings(recipe: StageRecipe) -> dict:
        """Arguments of this trainer that come from the recipe."""
        return {}

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {**inputs, "use_llm": self.use_llm}, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """As in transformers, or with batches by length, or those of a stream."""
        loader = partial(
            DataLoader,
            self.train_dataset,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        if isinstance(self.train_dataset, SpeechStream):  # accelerate would deal out again what is this process's own
            return loader(batch_size=None)
        if self.batches is not None:
            return self.accelerator.prepare(loader(batch_sampler=self.batches))
        return super().get_train_dataloader()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        rates = {f"{metric_key_prefix}_{name}": rate for name, rate in self.word_error_rates().items()}
        self.log(rates)
        return {**metrics, **rates}

    def word_error_rates(self) -> dict[str, float]:
        """
        Word error rates (%) on held-out utterances: `stage1_wer`, where there is a Stage 1, and `wer` when the LLM is a
        part of the stage.
        """
        casing = CASINGS[self.data.casing]
        references = [casing(utterance.text) for utterance in self.validation]
        results = transcribe(
            self.model,
            self.processing_class,
            [utterance.audio for utterance in self.validation],
            batch_size=self.data.eval_batch_size,
            progress=True,
            use_llm=self.use_llm,
        )
        rates = {}
        if self.model.aligner.writes_tokens:
            rates["stage1_wer"] = word_errors(references, [result.stage1 for result in results]).rate
        if self.use_llm:
            rates["wer"] = word_errors(references, [result.text for result in results]).rate
        return rates


def llm_adapters(model: SeamForSpeechRecognition) -> list[torch.nn.Parameter]:
    """The LoRA parameters: what Stages 2 and 3 train."""
    parameters = [parameter for name, parameter in model.language_model.named_parameters() if "lora_" in name]
    if not parameters:
        raise RecipeError("the model has no LoRA adapters to train; build it with config.lora_rank above 0.")
    return parameters


def new_model(recipe: StageRecipe, **config) -> tuple[SeamForSpeechRecognition, SeamProcessor]:
    """A model around the recipe's `encoder` and `llm`, and its processor. `config`: fields that the stage decides."""
    if recipe.encoder is None or recipe.llm is None:
        raise RecipeError("the recipe names neither a model nor both backbones (encoder and llm).")
    tokens = {key: value for key, value in asdict(recipe.processor).items() if value is not None}
    processor = SeamProcessor.from_backbones(recipe.encoder, recipe.llm, **tokens)
    torch.manual_seed(recipe.training.seed)  # of the fresh parts
    fields = {**recipe.config, **config}
    model = SeamForSpeechRecognition.from_backbones(
        recipe.encoder, recipe.llm, processor, aligner_from_decoder=recipe.aligner_from_decoder, **fields
    )
    return model, processor


def stage_before(recipe: StageRecipe) -> tuple[SeamForSpeechRecognition, SeamProcessor]:
    """Model and processor that Stages 2 and 3 go on with; a checkpoint of Stage 1 gets its LLM here."""
    if recipe.model is None:
        raise RecipeError("the recipe names no model: give the checkpoint of the stage before as model=FOLDER.")
    model, processor = load_checkpoint(recipe.model, dtype=torch.float32)
    if model.config.alignment_only:
        if recipe.llm is None and model.config.backbones is None:
            raise RecipeError(
                f"{recipe.model} holds Stage 1 alone, trained with an LLM from a folder: name it, llm=FOLDER."
            )
        torch.manual_seed(recipe.training.seed)  # of the fresh LoRA
        model.add_llm(recipe.llm)
    elif recipe.llm is not None:
        raise RecipeError(f"{recipe.model} holds its LLM already: leave llm out.")
    return model, processor


def read_utterances(data: DataSettings) -> tuple[list[Utterance], list[Utterance]]:
    """
    Training and validation utterances of a recipe; a stream's training utterances are not read here. Raises
    `RecipeError` when one of them is not given.
    """
    for name in ("train", "validation"):
        if not getattr(data, name):
            raise RecipeError(f"the recipe names no data.{name} manifest.")
    train = [] if data.streaming else [u for path in data.train for u in read_manifest(path, data.train_split)]
    validation = [u for path in data.validation for u in read_manifest(path, data.validation_split)]
    return taken_evenly(train, data.train_limit), taken_evenly(validation, data.validation_limit)


def check_fits(utterance: Utterance, model: SeamForSpeechRecognition, processor: SeamProcessor, casing: Callable):
    """Raise `RecipeError` for audio longer than the encoder's window or a transcript longer than the aligner's."""
    if utterance.duration > processor.max_seconds:
        raise RecipeError(
            f"{utterance.audio}: {utterance.duration:.1f} s of audio, but the encoder's window is "
            f"{processor.max_seconds} s."
        )
    tokens = len(processor.transcript_ids(casing(utterance.text)))
    limit = longest_transcript(model)
    if tokens > limit:
        raise RecipeError(
            f"{utterance.audio}: a transcript of {tokens} tokens, but the aligner has positions for {limit}."
        )


def taken_evenly(utterances: list[Utterance], limit: int | None) -> list[Utterance]:
    """At most `limit` utterances, from everywhere in the list."""
    if limit is None or limit >= len(utterances):
        return utterances
    return [utterances[index * len(utterances) // limit] for index in range(limit)]


def run(
    recipe: StageRecipe,
    trainer_class: type[StageTrainer],
    model: SeamForSpeechRecognition,
    processor: SeamProcessor,
    prepare: Callable = lambda dataset, name, utterances: dataset,
) -> dict[str, float]:
    """
    Train one stage and save the result in `training.output_dir`, from where the next stage and `from_pretrained` load.
    A run that was interrupted goes on from its last checkpoint there.

    Args:
        prepare: makes the training items of a stage from the (possibly encoded) data set, its name (`train` or
            `validation`) and its utterances.

    Returns:
        The metrics of the last evaluation.
    """
    set_seed(recipe.training.seed)
    train, validation = read_utterances(recipe.data)
    casing = CASINGS[recipe.data.casing]
    for utterance in (*train, *validation):
        check_fits(utterance, model, processor, casing)
    begun = origin(recipe, model, train, validation)
    checkpoint = find_checkpoint(recipe, begun)
    model.to(recipe.training.device)
    skipped = skipped_audio(recipe)
    read = training_data(recipe, train, model, processor, skipped)
    datasets = [read, SpeechDataset(validation, processor, casing)]
    if recipe.data.keep_encoder_states:
        datasets = [keep_encoder_states(model, dataset) for dataset in datasets]
    elif recipe.data.encoder_states is not None:
        datasets = states_on_disk(recipe, model, processor, datasets)
    items = prepare(datasets[0], "train", train)
    trainer = trainer_class(
        model=model,
        args=recipe.training,
        data_collator=SpeechCollator(processor),
        train_dataset=items,
        batches=length_batches(recipe, train, items, processor),
        eval_dataset=prepare(datasets[1], "validation", validation),
        origin=begun,
        processor=processor,
        validation=validation,
        data=recipe.data,
        **trainer_class.settings(recipe),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    if skipped is not None:
        metrics["skipped_audio"] = len(skipped)
    with written_aside(Path(recipe.training.output_dir)) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    return {**metrics, "output_dir": str(Path(recipe.training.output_dir))}
