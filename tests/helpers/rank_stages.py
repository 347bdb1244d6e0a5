"""
All stages in a few steps, for one process or for several, which write down what each was given.

    torchrun --nproc_per_node 2 rank_stages.py FOLDER MANIFEST ENCODER LLM
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from seam.tests.helpers.training_sounds import recipe
from seam.train import alignment, draft, instruction, refinement
from seam.train.trainer import StageTrainer

UTTERANCES = 7  # no multiple of a batch, or of two processes
EPOCHS = 2
# A step of Stage 2 takes two batches; of all others, one of four utterances, then one of three.
ACCUMULATED = {"instruction": 2}
# The weights of the first epoch are kept: the loss is said to be best at its highest.
FIRST_IS_BEST = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
}


def train_all(folder: Path, manifest: str, encoder: str, llm: str) -> None:
    """Run all stages with the same steps for any number of processes: batches of four together."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))

    def train(stage, **values):
        name = stage.__name__.rpartition(".")[2]
        training = {
            "max_steps": -1,
            "num_train_epochs": EPOCHS,
            "per_device_train_batch_size": 4 // ranks,
            "gradient_accumulation_steps": ACCUMULATED.get(name, 1),
            "logging_steps": 1,
            "warmup_steps": 0,
            "gradient_checkpointing": ranks > 1,  # computes the same
            **values.pop("training", {}),
        }
        data = {"train_limit": UTTERANCES, "keep_encoder_states": False, "eval_batch_size": 3, **values.pop("data", {})}
        with mock.patch.object(StageTrainer, "training_step", written_down(folder / name)):
            stage.main(recipe(folder / name, manifest, -1, training=training, data=data, **values))

    config = {"lora_rank": 4, "lora_dropout": 0.0, "llm_inputs": "continuous"}
    train(alignment, encoder=encoder, llm=llm, config=config, training=FIRST_IS_BEST)
    train(draft, model=str(folder / "alignment"), data={"encoder_states": str(folder / "states")})
    train(instruction, model=str(folder / "draft"), llm=llm)
    # Chances differ from rank to rank: everything is masked, nothing deleted.
    chances = {"masking_probability": 1 - 1e-12, "deletion_probability": 0.0, "mask": "learned"}
    train(refinement, model=str(folder / "instruction"), first_token_guidance=True, **chances)


def written_down(folder: Path):
    """`training_step` that keeps the labels which this process is given, one line for each batch."""
    training_step = StageTrainer.training_step

    def step(self, model, inputs, *args, **kwargs):
        assert isinstance(model, FSDPModule) == bool(os.environ.get("ACCELERATE_USE_FSDP"))
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"given-{self.args.process_index}.jsonl").open("a") as file:
            file.write(json.dumps(inputs["labels"].tolist()) + "\n")
        return training_step(self, model, inputs, *args, **kwargs)

    return step


def let_cpus_share(trainer_class) -> None:
    """Make accelerate use FSDP on CPUs, where torch's works, by telling it that these are other devices."""
    init = trainer_class.__init__

    def told(self, **kwargs):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        init(self, **kwargs)

    trainer_class.__init__ = told


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP"):
        let_cpus_share(StageTrainer)
    train_all(Path(sys.argv[1]), *sys.argv[2:])
