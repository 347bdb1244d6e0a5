"""What stages and draft share: reading the data, the word error rate on a held-out split, and the run itself."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch.utils.data import DataLoader, Subset
from transformers import EarlyStoppingCallback, ProgressCallback, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy, seed_worker

from seam.data.batching import SpeechCollator, SpeechDataset, keep_encoder_states
from seam.data.even_batches import EvenBatches
from seam.data.length_batches import LengthBatches
from seam.data.manifest import CASINGS, Utterance, read_manifest
from seam.data.streaming import SpeechStream
from seam.evaluation.scoring import word_errors
from seam.evaluation.transcription import load_checkpoint, transcribe
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.train.checkpoints import find_checkpoint, origin, read_trained, written_aside
from seam.train.curves import write_curves
from seam.train.encoder_states import states_on_disk
from seam.train.epochs import SetEpoch, StartStream
from seam.train.progress import Progress
from seam.train.ranks import of_all_ranks, own_share, shared_out, whole
from seam.train.recipe import FULL, DataSettings, RecipeError, StageRecipe
from seam.train.resuming import ResumableTrainer
from seam.train.throughput import Throughput
from seam.train.training_data import length_batches, longest_transcript, skipped_audio, training_data


class StageTrainer(ResumableTrainer, ABC):
    """
    The trainer of one stage of SEAM, or of its draft. Beside the loss, `evaluate` reports the word error rate of the
    held-out utterances, decoded as a user would decode them.

    On several processes (ranks) a step, an epoch and an evaluation are what they are on one, with a batch as many times
    as large: losses are means over the tokens of all ranks and accumulated batches, every utterance is seen once.

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
        args.accelerator_config.even_batches = False  # `EvenBatches` are, without repeating utterances
        if args.data_seed is None:
            args.data_seed = args.seed  # and not that of the moment, which may be each rank's own
        super().__init__(args=args, processing_class=processor, **kwargs)
        if self.is_fsdp_enabled:
            prepare_for_fsdp(self.accelerator.state.fsdp_plugin, self.model)
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise RecipeError("DeepSpeed: accepted are ZeRO stages up to 2; FSDP2 spreads the weights as well.")
        drawn = [one for one in (self.train_dataset, batches) if hasattr(one, "set_epoch")]
        self.add_callback(SetEpoch(*drawn))
        if isinstance(self.train_dataset, SpeechStream):
            self.add_callback(StartStream(self.train_dataset))
        extractor = processor.feature_extractor
        self.throughput = Throughput(extractor.hop_length / extractor.sampling_rate)
        self.add_callback(self.throughput)
        self.progress = Progress()
        if self.pop_callback(ProgressCallback):
            self.add_callback(self.progress)
        self.model.requires_grad_(False)
        for parameter in self.trained_parameters(self.model):
            parameter.requires_grad_(True)

    @staticmethod
    @abstractmethod
    def trained_parameters(model: SeamForSpeechRecognition) -> list[torch.nn.Parameter]:
        """The parameters that this stage trains; all others stay frozen."""

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.model.full_llm is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:  # there the LLM lies in full
            read_trained(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self):
        if self.model.full_llm is None:
            super()._load_best_model()
        else:
            read_trained(self.model, Path(self.state.best_model_checkpoint))

    @classmethod
    def error_rates(cls, model: SeamForSpeechRecognition) -> list[str]:
        """What `evaluate` reports of this model beside the loss, by name."""
        return ["stage1_wer"] * model.aligner.writes_tokens + ["wer"] * cls.use_llm

    @staticmethod
    def settings(recipe: StageRecipe) -> dict:
        """Arguments of this trainer that come from the recipe."""
        return {}

    def compute_loss(self, model, inputs, *args, **kwargs):
        # FSDP2 computes the parts that it spreads in half precision, but not what it is told to leave alone.
        with self.accelerator.autocast():
            return super().compute_loss(
                model, {**inputs, "use_llm": self.use_llm, "return_logits": False}, *args, **kwargs
            )

    def get_train_dataloader(self) -> DataLoader:
        """As in transformers, except that an epoch is the data set, once, for any number of ranks."""
        args = self.args
        loader = partial(
            DataLoader,
            self.train_dataset,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )
        if isinstance(self.train_dataset, SpeechStream):  # accelerate would deal out again what is this rank's own
            return loader(batch_size=None)
        batches = self.batches
        if batches is None:
            order = self._get_train_sampler(self.train_dataset)
            batches = EvenBatches(order, self._train_batch_size, args.world_size, args.dataloader_drop_last)
        return self.accelerator.prepare(loader(batch_sampler=batches))

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.progress.close()

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        return super().get_batch_samples(self.throughput.batches(epoch_iterator), *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        speed = self.throughput.measured() if "loss" in logs else {}
        super().log({**logs, **speed}, start_time)

    def _save_checkpoint(self, *args, **kwargs):
        with self.throughput.paused():
            super()._save_checkpoint(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """This rank's share of the held-out utterances."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(
            Subset(dataset, own_share(range(len(dataset)))),
            self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> EvalLoopOutput:
        """
        The loss is a mean over the tokens of the whole data set, whatever the batch size and the number of ranks. The
        word error rates are a part of it, so that trackers and early stopping are told them too.
        """
        self.callback_handler.eval_dataloader = dataloader
        loss_sum, tokens, utterances = 0.0, 0, 0
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            count = int((inputs["labels"] != -100).sum())
            loss_sum += float(self.compute_loss(self.evaluated, inputs)) * count
            tokens += count
            utterances += len(inputs["labels"])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss_sum, tokens, utterances = map(sum, zip(*of_all_ranks((loss_sum, tokens, utterances)), strict=True))
        metrics = {"loss": loss_sum / tokens, **self.word_error_rates()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=utterances)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        # Each rank evaluates its own share, with as many passes as that takes.
        self.evaluated = whole(self.model).eval()
        with torch.no_grad(), self.throughput.paused():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self.evaluated = None
        return metrics

    def word_error_rates(self) -> dict[str, float]:
        """
        Word error rates (%) on held-out utterances: `stage1_wer`, where there is a Stage 1, and `wer` when the LLM is a
        part of the stage.
        """
        casing = CASINGS[self.data.casing]
        references = [casing(utterance.text) for utterance in self.validation]
        decode = partial(
            transcribe,
            self.evaluated,
            self.processing_class,
            batch_size=self.data.eval_batch_size,
            progress=self.is_world_process_zero() and not self.args.disable_tqdm,
            use_llm=self.use_llm,
        )
        results = shared_out(decode, [utterance.audio for utterance in self.validation])
        rates = {}
        if self.evaluated.aligner.writes_tokens:
            rates["stage1_wer"] = word_errors(references, [result.stage1 for result in results]).rate
        if self.use_llm:
            rates["wer"] = word_errors(references, [result.text for result in results]).rate
        return rates


def prepare_for_fsdp(plugin: FullyShardedDataParallelPlugin, model: SeamForSpeechRecognition) -> None:
    """What FSDP2 must know of the model. Raises `RecipeError` for settings with which it cannot be trained."""
    if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
        raise RecipeError(
            "FSDP: accepted are fsdp_version 2 and fsdp_cpu_ram_efficient_loading false, as in recipes/accelerate."
        )
    # Stage 1 looks into the frozen table from outside of its own forward pass, where FSDP2 would show a share of it.
    plugin.ignored_modules = [model.get_input_embeddings()]
    if plugin.transformer_cls_names_to_wrap is None:
        kinds = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(kinds.intersection(model._no_split_modules))


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
        recipe.encoder,
        recipe.llm,
        processor,
        llm_dtype=held_in(recipe),
        aligner_from_decoder=recipe.aligner_from_decoder,
        **fields,
    )
    return model, processor


def held_in(recipe: StageRecipe) -> str | None:
    """The precision of the LLM, as `from_pretrained` takes it. Raises `RecipeError` where it cannot be held so."""
    if recipe.llm_dtype == FULL:
        return None
    given = recipe.training.fsdp or recipe.training.deepspeed
    if given or any(map(parse_flag_from_env, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))):
        raise RecipeError(
            f"llm_dtype is {recipe.llm_dtype!r}, but FSDP2 and DeepSpeed take weights of one precision only; accepted "
            "with them: float32. With the whole model on each GPU (recipes/accelerate/eight_gpus.yaml) all are."
        )
    return recipe.llm_dtype


def stage_before(recipe: StageRecipe) -> tuple[SeamForSpeechRecognition, SeamProcessor]:
    """Model and processor that Stages 2 and 3 go on with; a checkpoint of Stage 1 gets its LLM here."""
    if recipe.model is None:
        raise RecipeError("the recipe names no model: give the checkpoint of the stage before as model=FOLDER.")
    # A GPU quantizes faster than its machine.
    place = {"device_map": str(recipe.training.device)} if recipe.llm_dtype == "4bit" else {}
    model, processor = load_checkpoint(recipe.model, dtype=torch.float32, llm_dtype=held_in(recipe), **place)
    if model.config.alignment_only:
        if recipe.llm is None and model.config.backbones is None:
            raise RecipeError(
                f"{recipe.model} holds Stage 1 alone, trained with an LLM from a folder: name it, llm=FOLDER."
            )
        torch.manual_seed(recipe.training.seed)  # of the fresh LoRA
        model.add_llm(recipe.llm, held_in(recipe))
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


def check_best(training: TrainingArguments, metrics: list[str]) -> None:
    """Raise `RecipeError` for a best model that no evaluation tells. `metrics`: what evaluations report, by name."""
    best = training.metric_for_best_model
    if best is not None and best.removeprefix("eval_") not in metrics:
        raise RecipeError(f"training.metric_for_best_model is {best!r}; this stage reports: {', '.join(metrics)}.")
    if best is None and training.save_strategy == SaveStrategy.BEST:
        raise RecipeError(
            f"training.save_strategy is 'best', by training.metric_for_best_model; accepted: {', '.join(metrics)}."
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
    A run that was interrupted goes on from its last checkpoint there. Beside the checkpoint are the curves of the
    training, `curves.png`.

    Args:
        prepare: makes the training items of a stage from the (possibly encoded) data set, its name (`train` or
            `validation`) and its utterances.

    Returns:
        The metrics of the last evaluation.
    """
    check_best(recipe.training, ["loss", *trainer_class.error_rates(model)])
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
    if recipe.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.early_stopping_patience))
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    if skipped is not None:
        metrics["skipped_audio"] = len(skipped)
    folder = Path(recipe.training.output_dir)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # of all ranks together
    if recipe.training.should_save:
        with written_aside(folder) as aside:
            model.save_pretrained(aside, state_dict=weights)
            processor.save_pretrained(aside)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        best = trainer.state.best_global_step if recipe.training.load_best_model_at_end else None
        write_curves(trainer.state.log_history, folder / "curves.png", str(folder), best)
    trainer.accelerator.wait_for_everyone()  # no rank reads what is not written yet
    return {**metrics, "output_dir": str(folder)}
