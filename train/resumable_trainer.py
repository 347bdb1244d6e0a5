"""
Train with a `Trainer` that can be killed at any moment.

Started again, it resumes from its last checkpoint and computes exactly what it would have computed.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from seam.data.files import one_line
from seam.train.checkpoints import (
    UNFINISHED,
    differences,
    last_checkpoint,
    read_resume_state,
    remove_old_checkpoints,
    write_resume_state,
)
from seam.train.recipe import RecipeError

SAME_AGAIN = (
    "the same recipe would come to it again, so lower the learning rate or look for what is wrong with the data."
)


class ResumableTrainer(Trainer):
    """
    Train so that a run which resumes gives the losses and weights of one that was never interrupted.

    Beside what `Trainer` saves, checkpoints hold the losses that are not logged yet. The random state is not saved:
    every epoch and every step seed it by their number and `seed`, so that it does not matter what else was drawn
    before, in how many runs or by how many workers.

    A loss that is not finite ends the training, as does anything that cannot be read or written. The error says what
    happened, at which step, and which checkpoint is the last.

    Args:
        run_record: of this run (`seam.train.checkpoints.run_record`), which its checkpoints keep; empty by default.
        kwargs: of `Trainer`.
    """

    def __init__(self, *, args: TrainingArguments, run_record: dict[str, Any] | None = None, **kwargs):
        self.run_record = run_record or {}
        self.resumed = {}  # `resume.json` of the checkpoint that this run resumes from
        self.is_saving = False
        self.is_over = False  # the checkpoint was the last step's: nothing is left to train
        self.is_same_run = False  # rather than another run that begins from a named checkpoint
        args.logging_nan_inf_filter = False  # it would hide what `training_step` looks for
        super().__init__(args=args, **kwargs)
        self.add_callback(_ExactSteps(self))

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs):
        """
        Train as `Trainer.train` does.

        Args:
            resume_from_checkpoint: folder of a checkpoint.
            kwargs: of `Trainer.train`.

        Raises:
            RecipeError, OSError: for whatever ends the training early.
        """
        if resume_from_checkpoint is not None:
            resume_from_checkpoint = str(resume_from_checkpoint)
            self.resumed = read_resume_state(Path(resume_from_checkpoint))
            self.is_same_run = bool(self.resumed) and not differences(self.resumed["origin"], self.run_record)
        # For instance how many evaluations early stopping has waited.
        self.args.restore_callback_states_from_checkpoint = self.is_same_run
        self._name_run()
        if self.args.should_save:  # a process that died may have left it
            shutil.rmtree(Path(self.args.output_dir, UNFINISHED), ignore_errors=True)
        self.start_time = time.time()
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        except (OSError, ValueError) as error:
            last = last_checkpoint(Path(self.args.output_dir))
            kept = "there is no checkpoint yet" if last is None else f"the last checkpoint is {last}"
            raise (OSError if isinstance(error, OSError) else RecipeError)(
                f"{one_line(error).rstrip('.')}. The training has ended at step {self.state.global_step}; {kept}."
            ) from error

    # ---- resuming ----

    def restore(self) -> None:
        """Restore what `Trainer` does not; called when a training begins, before its first step."""
        self.state.compute_steps(self.args, self.state.max_steps)  # the recipe may log, evaluate and save at others now
        if self.state.global_step == 0:
            return
        self.args.eval_on_start = False  # the run that began has done so
        control = self.state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        ended = control.get("should_training_stop", False)
        self.is_over = self.state.global_step >= self.state.max_steps or (ended and self.is_same_run)
        for callback in self.callback_handler.callbacks:  # `Trainer` expects a state of each in the checkpoint
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
        if best.is_dir():  # the output folder may have been moved
            self.state.best_model_checkpoint = str(best)
        if self.resumed:
            self._tr_loss.fill_(self.resumed["loss_not_logged"])
            self._globalstep_last_logged = self.resumed["last_logged_step"]
            self._total_loss_scalar = self.resumed["loss_logged"]
            self._initial_global_step = 0  # so that the mean loss is that of all steps

    def _name_run(self) -> None:
        """Name the run; one that resumes keeps its name, so that trackers show a single run."""
        folder = Path(self.args.output_dir)
        before = self.resumed.get("run_name") if self.is_same_run else None
        self.args.run_name = self.args.run_name or before or f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(folder / "runs" / self.args.run_name)

    def _run_epoch(self, *args, **kwargs):
        if self.is_over:  # `Trainer` would take one more step
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial, num_train_samples, start_time):
        self.check_weights()
        # With a limit of 1 `Trainer` would delete all checkpoints but the best. Started again, a finished training
        # would repeat the steps after it.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(trial, num_train_samples, start_time - self.resumed.get("seconds", 0.0))
        finally:
            self.args.save_total_limit = limit

    def _save_rng_state(self, output_dir):
        """Save none: see the class."""

    def _load_rng_state(self, checkpoint):
        """Load none: see the class."""

    # ---- saving ----

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return str(Path(folder, UNFINISHED)) if self.is_saving else folder

    def _save_checkpoint(self, model, trial):
        self.check_weights()
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        unfinished = folder / UNFINISHED / checkpoint.name
        state = self._resume_state()
        self.is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_global_step == self.state.global_step:  # on every rank, as each loads it at the end
                self.state.best_model_checkpoint = str(checkpoint)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / "trainer_state.json"))
                write_resume_state(unfinished, state)
                if checkpoint.exists():  # an incomplete one, or the one that this run resumed from
                    shutil.rmtree(checkpoint)
                unfinished.replace(checkpoint)
                remove_old_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(f"{checkpoint} cannot be saved: {one_line(error)}") from error
        finally:
            self.is_saving = False
            if self.args.should_save:
                shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _resume_state(self) -> dict[str, Any]:
        """Return what `resume.json` holds of this run."""
        return {
            "origin": self.run_record,
            "loss_not_logged": self.accelerator.gather(self._tr_loss).mean().item(),
            "last_logged_step": self._globalstep_last_logged,
            "loss_logged": self._total_loss_scalar,
            "run_name": self.args.run_name,
            "seconds": self.resumed.get("seconds", 0.0) + time.time() - self.start_time,
        }

    # ---- what is not finite ----

    def training_step(self, *args, **kwargs):
        """Return the loss of a training step; raise `RecipeError` when it is not finite."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise RecipeError(f"the loss of step {self.state.global_step + 1} is {loss.item()}: {SAME_AGAIN}")
        return loss

    def check_weights(self) -> None:
        """Raise `RecipeError` when a trained parameter is not finite, so that no checkpoint is made of it."""
        for name, parameter in self.model.named_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if parameter.requires_grad and not torch.isfinite(local).all():
                raise RecipeError(f"after step {self.state.global_step} {name} is not finite any more: {SAME_AGAIN}")


class _ExactSteps(TrainerCallback):
    """Seed the epochs and the steps of a `ResumableTrainer`, and order what is due at the end of an epoch."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer
        self.saves_at_epoch_end = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.restore()

    def on_epoch_begin(self, args, state, control, **kwargs):
        set_seed(_seed(args.seed, 0, int(state.epoch or 0)))  # the same on all ranks: it decides the order of the data

    def on_step_begin(self, args, state, control, **kwargs):
        set_seed(_seed(args.seed, 1, state.global_step, args.process_index))

    def on_step_end(self, args, state, control, **kwargs):
        # Save after all else that is due at the end of an epoch: a run that resumes from the checkpoint skips it.
        self.saves_at_epoch_end = control.should_save and (state.epoch % 1 == 0 or control.should_training_stop)
        if self.saves_at_epoch_end:
            control.should_save = False

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or self.saves_at_epoch_end
        self.saves_at_epoch_end = False


def _seed(seed: int, *key: int) -> int:
    """Return a seed of 32 bits for an epoch or a step, independent of those with other keys."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])
