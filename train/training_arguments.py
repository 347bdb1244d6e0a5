"""Which fields of `TrainingArguments` the trainers do not keep: another value than the default is refused at once."""

from typing import Any

import torch
from transformers import TrainingArguments

LENGTHS = "utterances of similar length share a batch with data.batch_seconds and data.batch_tokens"
EVALUATION = "evaluations return the loss and word error rates, no predictions"
PUSH = "training.push_to_hub pushes the result, once, at the end"
PUSHED_BY = (
    "training.push_to_hub: seam train pushes what a stage saves, with its code and its card; from Python, call "
    "seam.publishing.push.push with the folder of the result."
)

# Accepted values, the default first, and why no other. A field that this version of transformers lacks is left out.
KEPT: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0.0,), "the losses are Eq. 3 to Eq. 5"),
    "neftune_noise_alpha": ((None,), "embeddings are what the aligner learns to predict"),
    "use_liger_kernel": ((False,), "there are no such kernels for SEAM"),
    "group_by_length": ((False,), LENGTHS),
    "train_sampling_strategy": (("random", "sequential"), LENGTHS),
    "length_column_name": (("length",), LENGTHS),
    "auto_find_batch_size": (
        (False,),
        "a run that resumes would not know the batch size; data.batch_seconds bounds it",
    ),
    "dataloader_multiprocessing_context": ((None,), "workers are started as Python starts them"),
    "dataloader_in_order": ((True,), "a run that resumes goes through the same batches"),
    "include_num_input_tokens_seen": (("no", False), "the inputs are audio; trainings report its seconds"),
    "include_tokens_per_second": ((False,), "the inputs are audio; trainings report its seconds"),
    "save_only_model": ((False,), "a run could not resume from such checkpoints"),
    "fp16_full_eval": ((False,), "evaluations decode as a user would"),
    "bf16_full_eval": ((False,), "evaluations decode as a user would"),
    "prediction_loss_only": ((False,), EVALUATION),
    "eval_accumulation_steps": ((None,), EVALUATION),
    "eval_do_concat_batches": ((True,), EVALUATION),
    "eval_use_gather_object": ((False,), EVALUATION),
    "include_for_metrics": (([],), EVALUATION),
    "batch_eval_metrics": ((False,), EVALUATION),
    "hub_strategy": (("every_save", "end"), PUSH),
    "hub_always_push": ((False,), PUSH),
    "hub_revision": ((None,), PUSH),
    "label_names": ((None,), "the labels are those of SeamProcessor"),
}
# Where batches are made within budgets or of a stream, rather than by transformers' sampler.
OWN_BATCHES = "data.batch_seconds, data.batch_tokens and data.streaming make batches of their own"
KEPT_BY_OWN_BATCHES: dict[str, tuple[tuple[Any, ...], str]] = {
    "train_sampling_strategy": (("random",), OWN_BATCHES),
    "dataloader_drop_last": ((False,), OWN_BATCHES),
}


def refusal(training: TrainingArguments, own_batches: bool = False) -> str | None:
    """
    Return why these settings are refused, with the first field that the trainers of the stages do not keep.

    Args:
        own_batches: whether the data makes its own (`OWN_BATCHES`).
    """
    for name, (accepted, reason) in (*KEPT.items(), *(KEPT_BY_OWN_BATCHES.items() if own_batches else ())):
        value = getattr(training, name, accepted[0])
        if value not in accepted:
            return f"training.{name} is {value!r}; accepted: {accepted[0]!r}, for {reason}."
    if own_batches and training.data_seed not in (None, training.seed):
        return f"training.data_seed is {training.data_seed}; accepted: that of training.seed, for {OWN_BATCHES}."
    for name in ("split_batches", "dispatch_batches"):
        if getattr(training.accelerator_config, name, None):
            return f"training.accelerator_config.{name} is true; accepted: false, for every rank makes its own batches."
    if training.fp16 and (training.use_cpu or not torch.accelerator.is_available()):
        return "training.fp16 is True, which needs an accelerator; accepted on a CPU: False, or training.bf16=true."
    return None
