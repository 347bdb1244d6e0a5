"""The alignment decoder: Whisper's own blocks, a mask over the speech, caches that change nothing."""

import pytest
import torch
from transformers import WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from seam.modeling_seam.aligner import CACHE

pytestmark = pytest.mark.oldest


def speech_of(model, batch=3, length=20):
    torch.manual_seed(3)
    return torch.randn(batch, length, model.config.aligner_config.d_model)


def aligned(model, ids, states, mask=None, **kwargs):
    return model.bridge(
        decoder_input_ids=ids,
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        attention_mask=mask,
        lookup=model.lookup,
        **kwargs,
    )


@pytest.fixture(scope="module", params=["linear", "table"])
def either(request, model, table_model):
    return {"linear": model, "table": table_model}[request.param]


def test_is_whispers_decoder_between_two_projections(model, backbones):
    """With the weights of a Whisper decoder it computes what that decoder computes."""
    decoder = WhisperForConditionalGeneration.from_pretrained(backbones[0]).model.decoder.eval()
    states, ids = speech_of(model), torch.randint(0, 300, (3, 7))
    hidden = model.bridge.input_projection(model.lookup.embed(ids))
    own = {k: v for k, v in model.bridge.state_dict().items() if "projection" not in k}
    missing, unexpected = decoder.load_state_dict(own, strict=False)
    assert missing == ["embed_tokens.weight"] and not unexpected
    expected = decoder(inputs_embeds=hidden, encoder_hidden_states=states).last_hidden_state
    torch.testing.assert_close(
        aligned(model, ids, states).aligned_embeds, model.bridge.output_projection(expected), rtol=1e-4, atol=1e-5
    )


def test_stepwise_equals_the_full_pass(either):
    states, ids = speech_of(either), torch.randint(0, 300, (3, 9))
    full = aligned(either, ids, states).aligned_embeds
    past, steps = None, []
    for position in range(ids.shape[1]):
        output = aligned(either, ids[:, position : position + 1], states, use_cache=True, **{CACHE: past})
        past = output[CACHE]
        steps.append(output.aligned_embeds)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-5)


def test_is_causal(either):
    states, ids = speech_of(either), torch.randint(0, 300, (3, 9))
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 300
    one, other = (aligned(either, x, states).aligned_embeds for x in (ids, changed))
    torch.testing.assert_close(one[:, :5], other[:, :5])
    assert not torch.allclose(one[:, 5:], other[:, 5:])


def test_masked_speech_states_do_not_matter(either):
    states, ids = speech_of(either), torch.randint(0, 300, (3, 5))
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, 12:] = 0
    noisy = states.clone()
    noisy[1, 12:] = 100.0
    one, other = (aligned(either, ids, x, mask).aligned_embeds for x in (states, noisy))
    torch.testing.assert_close(one, other)
    cut = aligned(either, ids[1:2], states[1:2, :12]).aligned_embeds
    torch.testing.assert_close(one[1:2], cut, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(aligned(either, ids, noisy).aligned_embeds[1], other[1])


def test_logits_are_minus_the_distance(either):
    states, ids = speech_of(either), torch.randint(0, 300, (3, 5))
    output = aligned(either, ids, states)
    distances = either.lookup.distances(output.aligned_embeds)
    torch.testing.assert_close(output.logits[..., : distances.shape[-1]], -distances)
    assert (output.logits[..., distances.shape[-1] :] == -torch.inf).all()  # Whisper's prompt, after the vocabulary
