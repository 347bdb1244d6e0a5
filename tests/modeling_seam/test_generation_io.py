"""Arguments of `generate` beyond the transcript: what is reported, and what is refused before anything is computed."""

from unittest.mock import patch

import pytest
import torch
from transformers import GenerationConfig
from transformers.utils import logging

from seam.modeling_seam.generation_io import LOOKUP

pytestmark = pytest.mark.oldest


@pytest.fixture(scope="module")
def batch(processor, waveforms):
    return processor(audio=waveforms[:2])


@pytest.fixture(scope="module")
def eager(build_model):
    model = build_model()
    model.set_attn_implementation("eager")  # the one that has weights to show
    return model


@pytest.mark.parametrize("use_llm", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        {"assistant_early_exit": 1},
        {"use_mtp": True},
        {"num_beams": 0},
        {"num_return_sequences": 0},
        {"num_return_sequences": True},
        {"max_new_tokens": 0},
        {"max_length": -1},
        {"num_beams": 1.5},
    ],
)
def test_what_would_change_the_transcript_is_refused_before_the_audio_is_read(model, batch, arguments, use_llm):
    name = next(iter(arguments))
    with patch.object(model.encoder, "forward", side_effect=AssertionError("the encoder has run")):
        with pytest.raises(ValueError, match=name):
            model.generate(**batch, use_llm=use_llm, **arguments)
        if not isinstance(arguments[name], float):
            given = GenerationConfig()
            setattr(given, name, arguments[name])
            with pytest.raises(ValueError, match=name):
                model.generate(**batch, use_llm=use_llm, generation_config=given)


@pytest.mark.parametrize("use_llm", [True, False])
def test_an_assistant_is_refused(model, batch, use_llm):
    with pytest.raises(ValueError, match=r"assistant_model: .* leave it out"):
        model.generate(**batch, use_llm=use_llm, assistant_model=model.language_model)
    with pytest.raises(ValueError, match=r"assistant_model: .* leave it out"):
        model.align(*model.encode(**batch), assistant_model=model.language_model)


def test_a_config_is_no_dictionary(model, batch):
    with pytest.raises(ValueError, match="generation_config is a dict; accepted: a GenerationConfig"):
        model.generate(**batch, generation_config={"num_beams": 2})


@pytest.mark.parametrize("use_llm", [True, False])
def test_drafts_by_repetition_write_the_same(model, batch, use_llm):
    alone = {name: value[:1] for name, value in batch.items()}
    plain = model.generate(**alone, use_llm=use_llm, max_new_tokens=8)
    lookup = {"max_new_tokens": 8, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    if use_llm and LOOKUP:
        with pytest.raises(ValueError, match=r"prompt_lookup_num_tokens: .* leave it out"):
            model.generate(**alone, **lookup)
    else:
        assert torch.equal(plain, model.generate(**alone, use_llm=use_llm, **lookup))


@pytest.mark.parametrize("beams", [1, 2])
def test_states_and_weights_of_the_language_model(eager, batch, beams):
    wanted = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    output = eager.generate(**batch, max_new_tokens=4, num_beams=beams, output_scores=True, **wanted)
    assert torch.equal(output.sequences, eager.generate(**batch, max_new_tokens=4, num_beams=beams))
    assert len(output.hidden_states) == len(output.attentions) == len(output.scores)
    assert {len(step) for step in output.hidden_states} == {3} and {len(step) for step in output.attentions} == {2}
    assert output.cross_attentions is None
    for states, weights in zip(output.hidden_states, output.attentions, strict=True):
        assert {state.shape[0] for state in states} == {2 * beams} and {state.shape[2] for state in states} == {48}
        assert {one.shape[:2] for one in weights} == {(2 * beams, 4)}
    if beams == 1:
        logits = eager.get_output_embeddings()(output.hidden_states[1][-1][:, -1])
        chosen = output.sequences[:, 2]  # the guiding token has no step
        assert torch.equal(logits.argmax(-1), chosen)


def test_states_and_weights_of_the_aligner(eager, batch):
    wanted = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    output = eager.generate(**batch, max_new_tokens=4, use_llm=False, **wanted)
    assert torch.equal(output.sequences, eager.generate(**batch, max_new_tokens=4, use_llm=False))
    assert len(output.hidden_states) == len(output.attentions) == len(output.cross_attentions) == 4
    for step, (states, weights, speech) in enumerate(
        zip(output.hidden_states, output.attentions, output.cross_attentions, strict=True)
    ):
        assert [state.shape for state in states] == [(2, 1, 32)] * 3
        assert [one.shape for one in weights] == [(2, 4, 1, step + 1)] * 2
        assert [one.shape[:3] for one in speech] == [(2, 4, 1)] * 2
        torch.testing.assert_close(speech[0].sum(-1), torch.ones(2, 4, 1))
    last = eager.bridge.predict(output.hidden_states[2][-1][:, -1], eager.lookup)[0]
    assert torch.equal(eager.lookup.nearest(last), output.sequences[:, 2])


def test_a_silent_row_has_states_of_zero(eager, batch):
    """Where Stage 1 found no token, the language model did not run."""
    with patch.object(eager, "align", wraps=eager.align) as align:

        def silenced(*args, **kwargs):
            output = type(eager).align(eager, *args, **kwargs)
            output.mask[0] = 0
            return output

        align.side_effect = silenced
        output = eager.generate(
            **batch, max_new_tokens=3, verify=False, output_hidden_states=True, return_dict_in_generate=True
        )
    assert all(not state[0].any() and state[1].any() for step in output.hidden_states for state in step)


@pytest.mark.parametrize("use_llm", [True, False])
def test_what_whispers_scripts_say_is_without_effect(model, batch, use_llm, caplog):
    plain = model.generate(**batch, use_llm=use_llm)
    said = {
        "condition_on_prev_tokens": False,
        "compression_ratio_threshold": 1.35,
        "temperature": (0.0, 0.2, 0.4),
        "logprob_threshold": -1.0,
        "no_speech_threshold": 0.6,
        "return_timestamps": False,
        "return_segments": None,
        "task": "transcribe",
    }
    logging.warning_once.cache_clear()
    assert torch.equal(model.generate(**batch, use_llm=use_llm, **said), plain)
    for name in ("condition_on_prev_tokens", "temperature", "no_speech_threshold"):
        assert name in caplog.text
    assert "return_" not in caplog.text and "task" not in caplog.text


@pytest.mark.parametrize(
    "asked",
    [
        {"return_timestamps": True},
        {"return_timestamps": "word"},
        {"return_segments": True},
        {"return_language": True},
        {"temperature": (0.2, 0.4)},
        {"temperature": (0.0, 0.4), "do_sample": True},
    ],
)
def test_what_whisper_would_answer_otherwise_is_refused(model, batch, asked):
    with pytest.raises(ValueError, match=next(iter(asked))):
        model.generate(**batch, **asked)


def test_audio_may_have_the_name_that_every_models_input_has(model, batch):
    features, mask = batch["input_features"], batch["attention_mask"]
    plain = model.generate(features, attention_mask=mask)
    assert torch.equal(model.generate(inputs=features, attention_mask=mask), plain)
    with pytest.raises(ValueError, match="inputs"):
        model.generate(features, inputs=features, attention_mask=mask)


@pytest.mark.parametrize("prompt", [None, "Stop! "])
def test_cutting_off_the_prompt_and_not_cutting_give_the_transcript(model, processor, waveforms, prompt):
    """As scripts for other speech models do after `apply_transcription_request`, and as Whisper's do."""
    inputs = processor.apply_transcription_request(waveforms, prompt=prompt)
    ids = model.generate(**inputs)
    texts = processor.batch_decode(ids)
    assert all(texts) and len(set(texts)) == 4
    assert processor.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True) == texts
    assert processor.decode(ids[:, inputs["input_ids"].shape[1] :]) == texts
    plain = processor.batch_decode(model.generate(**processor(audio=waveforms)))
    assert (plain == texts) == (prompt is None)
    output = model.generate(**inputs, return_dict_in_generate=True)
    assert torch.equal(output.sequences[:, inputs.input_ids.shape[1] :], ids)


def test_prompts_are_still_read_by_the_name_that_they_had(model, processor, batch):
    ids = torch.tensor([processor.prompt_ids("Stop! ")])
    labels = processor(text=["one", "two"])["labels"]
    assert torch.equal(model.generate(**batch, input_ids=ids), model.generate(**batch, prompt_input_ids=ids))
    nothing = torch.zeros(2, 0, dtype=torch.long)
    for given in ({"input_ids": ids}, {"prompt_input_ids": ids, "input_ids": nothing}):
        loss = model(**batch, labels=labels, **given).loss
        assert loss == model(**batch, labels=labels, prompt_input_ids=ids).loss
    assert torch.equal(model.generate(**batch, input_ids=nothing), model.generate(**batch))
