"""The prompt's constant beginning is computed once, and anew when what it depends on has changed."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from seam.modeling_seam.aligner import CACHE

pytestmark = pytest.mark.oldest


@pytest.fixture
def model(build_model):
    return build_model()


@pytest.fixture
def inputs(processor, waveforms):
    return processor(audio=waveforms)


@pytest.fixture
def length(model):
    return model.config.prompt_token_ids.index(model.config.audio_token_id)


def uncached(model, inputs, **kwargs):
    """Transcribe with the prefix going through the language model with the rest."""
    model._prefix_ids = lambda prompts: []
    try:
        return model.generate(**inputs, **kwargs)
    finally:
        del model._prefix_ids


def computed(model, inputs, **kwargs) -> tuple[int, torch.LongTensor]:
    """How often the prefix is computed in a call of `generate`, and what that writes."""
    prefixes = []
    hook = model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: prefixes.append("attention_mask" not in kwargs), with_kwargs=True
    )
    try:
        sequences = model.generate(**inputs, **kwargs)
    finally:
        hook.remove()
    return sum(prefixes), sequences


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}])
def test_a_kept_prefix_changes_no_token(model, inputs, length, guided, settings):
    assert length > 3
    settings = {"first_token_guidance": guided, "max_new_tokens": 12, **settings}
    assert computed(model, inputs, **settings)[0] == 1
    times, sequences = computed(model, inputs, **settings)
    assert times == 0
    assert torch.equal(sequences, uncached(model, inputs, **settings))
    assert torch.equal(sequences, model.generate(**inputs, **settings, verify=False))


def test_the_states_are_those_of_the_whole_prompt(model, length):
    ids = model.config.prompt_token_ids[:length]
    states = model._prefix.states(model.language_model, ids)
    assert len(states) == model.language_model.config.num_hidden_layers
    with torch.no_grad():
        whole = model.language_model(input_ids=torch.tensor([[*ids, 7, 8]]), use_cache=True)[CACHE]
    for (keys, values), layer in zip(states, whole.layers, strict=True):
        torch.testing.assert_close(keys, layer.keys[:, :, :length])
        torch.testing.assert_close(values, layer.values[:, :, :length])


def merge(model):
    model.merge_lora()


def load(model):
    state = {key: value * 1.05 if "mlp" in key else value for key, value in model.state_dict().items()}
    model.load_state_dict(state)


def write_in_place(model):
    with torch.no_grad():
        model.language_model.model.layers[0].mlp.up_proj.base_layer.weight.mul_(1.1)


def replace(model):
    layer = model.language_model.model.layers[1].input_layernorm
    layer.weight = torch.nn.Parameter(layer.weight * 1.2, requires_grad=False)


def switch_off(model):
    for module in model.language_model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)


def scale(model):
    for module in model.language_model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_scale("default", 3.0)


def to_another_dtype(model):
    model.to(torch.float64)


def train(model):
    model.train()
    model.language_model.model.layers[0].mlp.up_proj.base_layer.weight.data.mul_(1.1)  # unseen by torch
    model.eval()


def another_prompt(model):
    model.config.prompt_token_ids = [9, 10, *model.config.prompt_token_ids]


@pytest.mark.parametrize(
    "change", [merge, load, write_in_place, replace, switch_off, scale, to_another_dtype, train, another_prompt]
)
def test_a_change_is_seen(model, inputs, change):
    assert computed(model, inputs)[0] == 1
    change(model)
    if change is to_another_dtype:
        inputs = {**inputs, "input_features": inputs["input_features"].double()}
    times, sequences = computed(model, inputs)
    assert times == 1
    assert torch.equal(sequences, uncached(model, inputs))
    assert computed(model, inputs)[0] == 0


def test_one_kept_prefix_at_a_time(model, inputs):
    """Memory does not grow with prompts."""
    default = model.config.prompt_token_ids
    model.generate(**inputs)
    model.config.prompt_token_ids = [9, 10, *default]
    model.generate(**inputs)
    states = model._prefix.states(model.language_model, [9, 10, *default[: default.index(model.config.audio_token_id)]])
    assert {keys.shape[:1] + keys.shape[2:3] for keys, _ in states} == {
        (1, len(default[: default.index(model.config.audio_token_id)]) + 2)
    }


def test_prompts_of_ones_own(model, processor, waveforms):
    prompts = ["Transcribe the following audio:", "stop the music please turn on the light"]
    both = processor.apply_transcription_request(waveforms[:2], prompt=prompts)
    assert torch.equal(model.generate(**both), model.generate(**both, verify=False))
    same = processor.apply_transcription_request(waveforms[:2])
    assert computed(model, same)[0] == 1  # the default one, given
    assert torch.equal(model.generate(**same), uncached(model, same))


def test_none_is_kept_in_training(model, inputs):
    model.language_model.requires_grad_(True)
    model.train()
    assert computed(model, inputs)[0] == 0


def test_none_is_kept_for_sliding_windows(model, inputs):
    """A window would count the padding between prefix and audio."""
    assert model._prefix_ids(model.prompt_rows(2, None, None))
    model.language_model.config.layer_types = ["full_attention", "sliding_attention"]
    assert model._prefix_ids(model.prompt_rows(2, None, None)) == []
