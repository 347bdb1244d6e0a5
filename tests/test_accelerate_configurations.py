"""The configurations in recipes/accelerate, as the own classes of accelerate read them."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from seam.train.distributed import prepare_for_fsdp
from seam.train.recipe import RecipeError

FOLDER = Path(__file__).parents[1] / "recipes" / "accelerate"
PROCESSES = {"one_gpu": 1, "eight_gpus": 8, "several_nodes": 16, "fsdp": 8, "deepspeed_zero2": 8}
KINDS = {
    "one_gpu": DistributedType.NO,
    "eight_gpus": DistributedType.MULTI_GPU,
    "several_nodes": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
}


def test_none_is_untested():
    assert {path.stem for path in FOLDER.iterdir()} == set(PROCESSES)


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses unknown keys
    assert config.distributed_type == KINDS[name] and config.num_processes == PROCESSES[name]
    assert config.num_machines == (2 if name == "several_nodes" else 1)
    assert config.mixed_precision is None  # the recipe's
    # accelerate looks at these keys one by one, and passes over those that it does not know.
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert not [key for key in (*config.fsdp_config, *config.deepspeed_config) if key not in known]


@pytest.fixture
def fsdp_plugin(monkeypatch):
    """Return the plugin that a process has which `accelerate launch` started with fsdp.yaml."""
    config = load_config_from_file(str(FOLDER / "fsdp.yaml"))
    arguments = launch_command_parser().parse_args(
        ["--use_fsdp", "--num_machines", "1", "--num_processes", "8", "script.py"]
    )
    arguments.mixed_precision, arguments.dynamo_backend = "no", "no"
    for key, value in config.fsdp_config.items():
        setattr(arguments, key, value)
    for key, value in prepare_multi_gpu_env(arguments).items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    return FullyShardedDataParallelPlugin()


def test_fsdp_spreads_the_layers_and_leaves_the_table(fsdp_plugin, model):
    assert fsdp_plugin.fsdp_version == 2 and fsdp_plugin.reshard_after_forward is True
    assert fsdp_plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert "FULL_STATE_DICT" in str(fsdp_plugin.state_dict_type)
    prepare_for_fsdp(fsdp_plugin, model)
    assert fsdp_plugin.ignored_modules == [model.get_input_embeddings()]
    layers = ["Qwen3DecoderLayer", "WhisperDecoderLayer", "WhisperEncoderLayer"]
    assert fsdp_plugin.transformer_cls_names_to_wrap == layers


def test_fsdp_spreads_the_layers_that_there_are(fsdp_plugin, build_model):
    prepare_for_fsdp(fsdp_plugin, build_model(alignment_only=True))
    assert fsdp_plugin.transformer_cls_names_to_wrap == ["WhisperDecoderLayer", "WhisperEncoderLayer"]


@pytest.mark.parametrize("setting", [{"fsdp_version": 1}, {"cpu_ram_efficient_loading": True}])
def test_what_fsdp_cannot_do_is_refused(fsdp_plugin, model, setting):
    for name, value in setting.items():
        setattr(fsdp_plugin, name, value)
    with pytest.raises(RecipeError, match="FSDP: accepted are fsdp_version 2 and fsdp_cpu_ram_efficient_loading false"):
        prepare_for_fsdp(fsdp_plugin, model)


def test_deepspeed_is_told_the_stage():
    config = load_config_from_file(str(FOLDER / "deepspeed_zero2.yaml")).deepspeed_config
    assert config == {"zero_stage": 2, "offload_optimizer_device": "none"}  # the rest is the recipe's
