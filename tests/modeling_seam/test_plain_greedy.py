"""What is plain greedy search, and what is left to the stock loop."""

from types import SimpleNamespace

import pytest
from torch import nn
from transformers import GenerationConfig

from seam.modeling_seam.plain_greedy import is_plain_greedy, is_shared, merged_settings


def settings_of(**fields):
    return merged_settings(GenerationConfig(**fields), SimpleNamespace(generation_config=GenerationConfig()))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_new_tokens": 4, "eos_token_id": [1, 2], "pad_token_id": 0, "return_dict_in_generate": True},
        {"temperature": 0.3, "top_k": 5},  # read in sampling only
        {"num_beams": 1, "do_sample": False, "repetition_penalty": 1.0, "use_cache": True},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_plain(fields):
    assert is_plain_greedy(settings_of(**fields), {"streamer": None, "synced_gpus": False})


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 2},
        {"do_sample": True},
        {"output_scores": True},
        {"repetition_penalty": 1.3},
        {"suppress_tokens": [5]},
        {"cache_implementation": "quantized"},
        {"use_cache": False},
        {"stop_strings": ["a"]},
        {"max_time": 3.0},
        {"min_new_tokens": 4},
        {"a_setting_of_tomorrow": 1},
    ],
    ids=str,
)
def test_anything_else(fields):
    assert not is_plain_greedy(settings_of(**fields), {})


def test_arguments_and_the_models_own_settings_count():
    assert not is_plain_greedy(settings_of(), {"logits_processor": [object()]})
    model = SimpleNamespace(generation_config=GenerationConfig(suppress_tokens=[5], max_new_tokens=7))
    settings = merged_settings(GenerationConfig(max_new_tokens=3), model)
    assert settings["max_new_tokens"] == 3 and settings["suppress_tokens"] == [5]
    assert not is_plain_greedy(settings, {})


def test_weights_that_processes_share():
    model = nn.Linear(2, 2)
    assert not is_shared(model)
    model._is_fsdp_managed_module = True
    assert is_shared(model)
