"""What a loaded model promises as a built one does: the backbones stay frozen, and what is beside them."""

import pytest
import torch
from transformers import AutoModel

from seam.modeling_seam import SeamForSpeechRecognition

pytestmark = pytest.mark.oldest


@pytest.fixture(scope="module")
def built(build_model):
    model = build_model()
    model.add_draft_head(range(40, 60))
    return model.add_mask_embedding()


@pytest.fixture(scope="module")
def folder(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    built.save_pretrained(folder)
    return folder


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"llm_dtype": "bfloat16"}, {"device_map": "cpu"}])
def test_a_loaded_model_is_frozen_like_a_built_one(built, folder, options):
    expected = trained(built)
    assert expected and all(name.startswith("bridge.") for name in expected)
    loaded = SeamForSpeechRecognition.from_pretrained(folder, **options)
    assert trained(loaded) == expected
    loaded.train()
    modes = {name: part.training for name, part in loaded.named_children()}
    assert modes == {"encoder": False, "bridge": True, "language_model": False, "draft_head": False}


def test_so_is_one_of_given_weights_and_of_an_auto_class(built, folder):
    expected = trained(built)
    given = SeamForSpeechRecognition.from_pretrained(None, config=built.config, state_dict=built.state_dict())
    pair = SeamForSpeechRecognition.from_pretrained(folder, output_loading_info=True)
    for loaded in (given, pair[0], AutoModel.from_pretrained(folder), AutoModel.from_config(built.config)):
        assert trained(loaded) == expected


def test_so_is_stage_1_alone(build_model, tmp_path):
    model = build_model(alignment_only=True)
    model.save_pretrained(tmp_path)
    assert trained(SeamForSpeechRecognition.from_pretrained(tmp_path)) == trained(model) != set()
