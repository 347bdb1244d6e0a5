"""Share among the trainers of the stages and of the draft head: batches, evaluation and what a training shows."""

from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from transformers import ProgressCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, seed_worker

from seam.data.manifest import CASINGS, Utterance
from seam.data.samplers import EvenBatchSampler, LengthBatchSampler
from seam.data.streaming import SpeechStream
from seam.evaluation.scoring import word_errors
from seam.evaluation.transcription import transcribe
from seam.modeling_seam import SeamForSpeechRecognition
from seam.modeling_seam.weights import new_name
from seam.train.checkpoints import load_trained_parameters
from seam.train.distributed import all_gather, map_over_ranks, prepare_for_fsdp, shard, unsharded
from seam.train.monitoring import Progress, Throughput
from seam.train.recipe import DataSettings, RecipeError, StageRecipe
from seam.train.resumable_trainer import ResumableTrainer
from seam.train.training_arguments import PUSHED_BY, refusal


class StageTrainer(ResumableTrainer, ABC):
    """
    Train one stage of SEAM, or its draft head.

    Beside the loss, `evaluate` reports the word error rate of held-out utterances, decoded as a user would decode them.

    N processes (ranks) train and evaluate as one process with batches N times as large would: losses are means over the
    tokens of all ranks and accumulated batches, and every utterance is seen once an epoch.

    Args:
        processor ([`SeamProcessor`]): saved with every checkpoint.
        validation (`list[Utterance]`): held-out utterances for the word error rate.
        data (`DataSettings`): casing and batch size of the decoding.
        batches (`LengthBatchSampler`, *optional*): of the training data; by default of one size, in random order.
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
        batches: LengthBatchSampler | None = None,
        **kwargs,
    ):
        if refused := PUSHED_BY if args.push_to_hub else refusal(args, data.has_budget or data.streaming):
            raise RecipeError(refused)
        self.validation = validation
        self.batches = batches
        self.data = data
        args.remove_unused_columns = False  # the collator, not the data set, makes the arguments of `forward`
        args.accelerator_config.even_batches = False  # accelerate's repeat utterances, `EvenBatchSampler` does not
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # there are none: the loss depends on all that a stage trains
        if args.data_seed is None:
            args.data_seed = args.seed  # transformers would draw one, on each rank its own
        args.dataloader_pin_memory &= torch.accelerator.is_available()  # torch warns where there is nothing to pin for
        super().__init__(args=args, processing_class=processor, **kwargs)
        # Tied weights are in no file; the best checkpoint would be loaded with a warning that they are missing.
        self.model._keys_to_ignore_on_save = set(self.model.get_expanded_tied_weights_keys(all_submodels=True))
        if self.is_fsdp_enabled:
            prepare_for_fsdp(self.accelerator.state.fsdp_plugin, self.model)
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise RecipeError("DeepSpeed: accepted are ZeRO stages up to 2; to shard the weights as well, use FSDP2.")
        self.model.register_load_state_dict_pre_hook(_rename_old_weights)
        self._watch(processor)
        self.model.requires_grad_(False)
        for parameter in self.trained_parameters(self.model):
            parameter.requires_grad_(True)

    def _watch(self, processor) -> None:
        """Add the callbacks that follow the data and measure the speed."""
        self.add_callback(SetEpoch(*(one for one in (self.train_dataset, self.batches) if hasattr(one, "set_epoch"))))
        if isinstance(self.train_dataset, SpeechStream):
            self.add_callback(StartStream(self.train_dataset))
        extractor = processor.feature_extractor
        self.throughput = Throughput(extractor.hop_length / extractor.sampling_rate)
        self.add_callback(self.throughput)
        self.progress = Progress()
        if self.pop_callback(ProgressCallback):
            self.add_callback(self.progress)

    @staticmethod
    @abstractmethod
    def trained_parameters(model: SeamForSpeechRecognition) -> list[torch.nn.Parameter]:
        """Return the parameters that this stage trains; all others stay frozen."""

    @classmethod
    def metric_names(cls, model: SeamForSpeechRecognition) -> list[str]:
        """Return the names of the metrics that `evaluate` reports of this model beside the loss."""
        return ["stage1_wer"] * model.bridge.has_stage_1 + ["wer"] * cls.use_llm

    @staticmethod
    def settings(recipe: StageRecipe) -> dict:
        """Return the arguments of this trainer that come from the recipe."""
        return {}

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Return the loss of a batch; logits are not computed."""
        # FSDP2 computes in half precision what it shards, but not the modules that it ignores.
        with self.accelerator.autocast():
            return super().compute_loss(
                model, {**inputs, "use_llm": self.use_llm, "return_logits": False}, *args, **kwargs
            )

    def get_train_dataloader(self) -> DataLoader:
        """Return transformers' loader, except that an epoch is the data set, once, for any number of ranks."""
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
        if isinstance(self.train_dataset, SpeechStream):  # this rank's batches, which accelerate would shard once more
            return loader(batch_size=None)
        batches = self.batches
        if batches is None:
            order = self._get_train_sampler(self.train_dataset)
            batches = EvenBatchSampler(order, self._train_batch_size, args.world_size, args.dataloader_drop_last)
        return self.accelerator.prepare(loader(batch_sampler=batches))

    def train(self, *args, **kwargs):
        """Train as `ResumableTrainer.train` does, and close the progress bars."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.progress.close()

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        """Return the batches of the next step, counted."""
        return super().get_batch_samples(self.throughput.batches(epoch_iterator), *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the numbers of a step, with the throughput since the last ones."""
        speed = self.throughput.measured() if "loss" in logs else {}
        super().log({**logs, **speed}, start_time)

    def _save_checkpoint(self, *args, **kwargs):
        with self.throughput.paused():
            super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.model.stored_llm is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:  # the checkpoint holds the LLM in full, the model holds it in lower precision
            load_trained_parameters(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self):
        if self.model.stored_llm is None:
            super()._load_best_model()
        else:
            load_trained_parameters(self.model, Path(self.state.best_model_checkpoint))

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Return a loader of this rank's share of the held-out utterances."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(
            Subset(dataset, shard(range(len(dataset)))),
            self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> EvalLoopOutput:
        """
        Evaluate the loss and the word error rates, the latter here so that trackers and early stopping see them.

        The loss is the mean over the tokens of the whole data set, whatever the batch size and the number of ranks.
        """
        self.callback_handler.eval_dataloader = dataloader
        loss_sum, tokens, utterances = 0.0, 0, 0
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            count = int((inputs["labels"] != -100).sum())
            loss_sum += float(self.compute_loss(self.eval_model, inputs)) * count
            tokens += count
            utterances += len(inputs["labels"])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.progress.on_evaluate(self.args, self.state, self.control)  # its bar ends before that of the transcripts
        loss_sum, tokens, utterances = map(sum, zip(*all_gather((loss_sum, tokens, utterances)), strict=True))
        metrics = {"loss": loss_sum / tokens, **self.word_error_rates()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=utterances)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluate as `Trainer.evaluate` does, out of the training's time."""
        # All ranks must take part in every forward pass of a sharded model, but may have different numbers of batches.
        self.eval_model = unsharded(self.model).eval()
        with torch.no_grad(), self.throughput.paused():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self.eval_model = None
        return metrics

    def word_error_rates(self) -> dict[str, float]:
        """
        Return word error rates (%) on the held-out utterances.

        These are `stage1_wer`, where the bridge has a Stage 1, and `wer`, where the stage uses the LLM.
        """
        casing = CASINGS[self.data.casing]
        references = [casing(utterance.text) for utterance in self.validation]
        decode = partial(
            transcribe,
            self.eval_model,
            self.processing_class,
            batch_size=self.data.eval_batch_size,
            progress=self.is_world_process_zero() and not self.args.disable_tqdm and self.progress.training_bar is None,
            use_llm=self.use_llm,
        )
        results = map_over_ranks(decode, [utterance.audio for utterance in self.validation])
        metrics = {}
        if self.eval_model.bridge.has_stage_1:
            metrics["stage1_wer"] = word_errors(references, [result.stage1 for result in results]).error_rate
        if self.use_llm:
            metrics["wer"] = word_errors(references, [result.text for result in results]).error_rate
        return metrics


class SetEpoch(TrainerCallback):
    """
    Tell data sets and samplers which epoch begins, so that what they draw depends on its number alone.

    accelerate's loaders do so too, but do not reach all of them on several ranks, or after resuming within an epoch.

    Args:
        targets: objects with a `set_epoch` method.
    """

    def __init__(self, *targets):
        self.targets = targets

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Set the epoch."""
        for target in self.targets:
            target.set_epoch(int(state.epoch or 0))


class StartStream(TrainerCallback):
    """
    Tell a stream how many batches a run that resumes skips, so that it need not read them for the `Trainer` to drop.

    Args:
        stream ([`SpeechStream`]): of the training data.
    """

    def __init__(self, stream):
        self.stream = stream

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Set the number of batches to skip."""
        self.stream.skip_batches(0 if args.ignore_data_skip else state.global_step * args.gradient_accumulation_steps)


def replace_at_random(token_ids: torch.Tensor, choices: torch.Tensor, share: float) -> torch.Tensor:
    """Replace a share of the ids `(batch, tokens)`, but none below 0, by ids drawn from `choices` `(n,)`."""
    choices = choices.to(token_ids.device)
    drawn = choices[torch.randint(len(choices), token_ids.shape, device=token_ids.device)]
    is_replaced = torch.rand(token_ids.shape, device=token_ids.device) < share
    return torch.where(is_replaced & (token_ids >= 0), drawn, token_ids)


def _rename_old_weights(module, state_dict, *_) -> None:
    """Rename the weights of a checkpoint with old names, which the `Trainer` would skip with a warning."""
    for name in list(state_dict):
        state_dict[new_name(name)] = state_dict.pop(name)
