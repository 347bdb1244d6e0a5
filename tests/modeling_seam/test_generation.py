"""Algorithms 1 and 2 and First Token Guidance against loops written out here."""

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer

from seam.modeling_seam import SeamForSpeechRecognition

pytestmark = pytest.mark.oldest


@pytest.fixture(scope="module", params=["linear", "table"])
def build_model(request, build_model, build_table_model):
    """Make models of both ways in which the aligner reads and writes tokens."""
    return {"linear": build_model, "table": build_table_model}[request.param]


@pytest.fixture(scope="module")
def model(build_model):
    return build_model()


def naive_stage1(model, states, mask, limit):
    """Algorithm 1, line by line: no cache, no stock loop, one utterance."""
    tokens = [model.config.boa_token_id]
    while len(tokens) <= limit:
        ids = torch.tensor([tokens[1:]], dtype=torch.long)
        predicted = model.teacher_forced(states, mask, ids)[0, -1]
        nearest = int(model.lookup.distances(predicted).argmin())
        tokens.append(nearest)
        if nearest == model.config.eoa_token_id:
            break
    return [token for token in tokens[1:] if token != model.config.eoa_token_id]


def naive_llm(model, prompt, aligned, guide, limit):
    """Algorithm 2 from the prompt on: embeddings in, argmax, no cache."""
    embed = model.get_input_embeddings()
    place = prompt.index(model.config.audio_token_id)
    embeds = torch.cat(
        [embed(torch.tensor(prompt[:place])), aligned, embed(torch.tensor(prompt[place + 1 :])), embed(guide)]
    )
    decoded = guide.tolist()
    while len(decoded) < limit:
        token = int(model.language_model(inputs_embeds=embeds[None]).logits[0, -1].argmax())
        decoded.append(token)
        if token == model.generation_config.eos_token_id:
            break
        embeds = torch.cat([embeds, embed(torch.tensor([token]))])
    return decoded


def rows(sequences, mask):
    return [row[keep.bool()].tolist() for row, keep in zip(sequences, mask, strict=True)]


def trimmed(row, *ends):
    row = row.tolist() if torch.is_tensor(row) else row
    return row[: min([row.index(end) for end in ends if end in row], default=len(row))]


@pytest.fixture(scope="module")
def batch(processor, waveforms):
    return processor(audio=waveforms)


@pytest.fixture(scope="module")
def short_model(build_model, model, batch):
    """
    Make a model whose Stage 1 ends early and after different lengths.

    Its <EOA> is a token that the random model outputs at different positions for different sounds.
    """
    decoded = model.align(*model.encode(**batch)).sequences.tolist()
    for token in sorted({token for row in decoded for token in row}):
        lengths = {row.index(token) if token in row else len(row) for row in decoded}
        if len(lengths) > 1 and 0 not in lengths:
            short = build_model()
            short.config.eoa_token_id = token
            return short
    pytest.fail("no token of the random model ends its rows at different places")


@pytest.mark.usefixtures("build_model")  # of which both are made
@pytest.mark.parametrize("which", ["model", "short_model"])
def test_stock_greedy_search_is_algorithm_1(request, which, batch):
    model = request.getfixturevalue(which)
    states, mask = model.encode(**batch)
    alignment = model.align(states, mask)
    limit = model.config.max_alignment_tokens
    expected = [naive_stage1(model, states[i : i + 1], mask[i : i + 1], limit) for i in range(len(states))]
    assert rows(alignment.sequences, alignment.mask) == expected
    if which == "short_model":
        assert len({len(one) for one in expected}) > 1, "the test needs outputs of different lengths"


@pytest.mark.parametrize("llm_inputs", ["nearest", "continuous"])
@pytest.mark.parametrize("guided", [True, False])
def test_generate_is_algorithm_2(build_model, processor, batch, llm_inputs, guided):
    model = build_model(llm_inputs=llm_inputs)
    output = model.generate(**batch, first_token_guidance=guided, max_new_tokens=9, return_dict_in_generate=True)
    eos = model.generation_config.eos_token_id
    for i, stage1_ids in enumerate(rows(output.alignment_sequences, output.alignment_mask)):
        stage1_ids = torch.tensor(stage1_ids)
        predicted = output.aligned_embeds[i, : len(stage1_ids)]
        aligned = predicted if llm_inputs == "continuous" else model.get_input_embeddings()(stage1_ids)
        expected = naive_llm(model, processor.prompt_ids(), aligned, stage1_ids[: int(guided)], 9)
        assert trimmed(output.sequences[i], eos) == trimmed(expected, eos)
        if guided:
            assert output.sequences[i, 0] == stage1_ids[0]


@pytest.mark.usefixtures("build_model")  # of which both are made
@pytest.mark.parametrize("which", ["model", "short_model"])
@pytest.mark.parametrize("kwargs", [{}, {"use_llm": False}, {"first_token_guidance": False}])
def test_batch_equals_single(request, which, processor, waveforms, batch, kwargs):
    model = request.getfixturevalue(which)
    together = model.generate(**batch, return_dict_in_generate=True, **kwargs)
    pad = model.generation_config.pad_token_id
    for i, waveform in enumerate(waveforms):
        alone = model.generate(**processor(audio=waveform), return_dict_in_generate=True, **kwargs)
        assert rows(alone.alignment_sequences, alone.alignment_mask) == rows(
            together.alignment_sequences[i : i + 1], together.alignment_mask[i : i + 1]
        )
        length = alone.sequences.shape[1]
        assert alone.sequences[0].tolist() == together.sequences[i, :length].tolist()
        assert (together.sequences[i, length:] == pad).all()
        kept = int(alone.alignment_mask.sum())
        torch.testing.assert_close(
            alone.alignment_distances[0], together.alignment_distances[i, :kept], rtol=1e-3, atol=1e-4
        )


def test_padding_after_the_encoder_changes_nothing(model, batch):
    states, mask = model.encode(**batch)
    longer = torch.nn.functional.pad(states, (0, 0, 0, 15), value=3.0)
    longer_mask = torch.nn.functional.pad(mask, (0, 15))
    one = model.generate(speech_states=states, speech_mask=mask)
    assert torch.equal(one, model.generate(speech_states=longer, speech_mask=longer_mask))
    assert torch.equal(one, model.generate(**batch))


def test_unmasked_padding_is_heard(build_model, processor, waveforms):
    model = build_model(mask_speech_padding=False)
    states, mask = model.encode(**processor(audio=waveforms[:1]))
    assert states.shape[1] == model.config.audio_config.max_source_positions and mask.all()


def test_empty_stage1_gives_an_empty_transcript(build_model, predict_end, processor, batch):
    model = build_model()
    predict_end(model)
    for kwargs in ({}, {"use_llm": False}):
        assert processor.batch_decode(model.generate(**batch, **kwargs)) == [""] * 4
    assert model.generate(**batch, num_return_sequences=3, do_sample=True).shape == (12, 0)


def test_a_silent_row_among_others_stays_empty(short_model, batch):
    states, mask = short_model.encode(**batch)
    alignment = short_model.align(states, mask)
    alignment.mask[1] = 0
    short_model.align, original = (lambda *args, **kwargs: alignment), short_model.align
    try:
        sequences = short_model.generate(speech_states=states, speech_mask=mask)
    finally:
        short_model.align = original
    assert (sequences[1] == short_model.generation_config.pad_token_id).all()
    whole = short_model.generate(speech_states=states, speech_mask=mask)
    length = min(whole.shape[1], sequences.shape[1])
    assert torch.equal(whole[[0, 2, 3], :length], sequences[[0, 2, 3], :length])


def test_stage1_tokens_are_text_or_end(model, processor, batch):
    alignment = model.align(*model.encode(**batch))
    assert not set(alignment.sequences.flatten().tolist()) & set(model.config.lookup_excluded_ids)


@pytest.mark.parametrize(
    ("kwargs", "shape"),
    [
        ({"max_new_tokens": 1}, (4, 1)),
        ({"max_new_tokens": 4}, (4, 4)),
        ({"max_length": 4}, (4, 4)),
        ({"max_new_tokens": 1, "num_return_sequences": 2, "do_sample": True}, (8, 1)),
        ({"num_beams": 2, "max_new_tokens": 4}, (4, 4)),
        ({"num_return_sequences": 2, "do_sample": True, "max_new_tokens": 4}, (8, 4)),
        ({"use_llm": False, "num_beams": 2, "max_new_tokens": 4}, (4, 4)),
    ],
)
def test_generation_arguments(model, batch, kwargs, shape):
    assert model.generate(**batch, **kwargs).shape == shape
    given = GenerationConfig(pad_token_id=0, **{k: v for k, v in kwargs.items() if k != "use_llm"})
    assert model.generate(**batch, use_llm=kwargs.get("use_llm", True), generation_config=given).shape == shape


@pytest.mark.parametrize("use_llm", [True, False])
def test_beams_find_what_greedy_search_misses(model, batch, use_llm):
    greedy, beams = (model.generate(**batch, use_llm=use_llm, num_beams=n, max_new_tokens=5) for n in (1, 4))
    assert not torch.equal(greedy, beams)


def test_several_sequences_for_each_utterance(short_model, batch):
    output = short_model.generate(
        **batch, use_llm=False, num_beams=2, num_return_sequences=2, max_new_tokens=8, return_dict_in_generate=True
    )
    assert output.sequences.shape[0] == output.alignment_distances.shape[0] == 8


def test_stage_1_uses_no_whisper_defaults(backbones, processor, batch):
    """A config made from a dictionary brings Whisper's own forbidden ids with it, which are words here."""
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "init_std": 0.3}
    sizes["max_target_positions"] = 24
    torch.manual_seed(1)
    model = SeamForSpeechRecognition.from_backbones(*backbones, processor, aligner_config=sizes).eval()
    states, mask = model.encode(**batch)
    first = model.align(states, mask).sequences[0, 0].item()
    model.bridge.config.suppress_tokens = model.bridge.config.begin_suppress_tokens = [first]
    assert model.align(states, mask).sequences[0, 0] == first


def test_more_tokens_than_positions_are_refused(model, batch):
    limit = model.config.max_alignment_tokens
    with pytest.raises(ValueError, match=f"max_new_tokens is 60, but the aligner has positions for {limit}"):
        model.generate(**batch, use_llm=False, max_new_tokens=60)


def test_one_prompt_for_all_and_too_few(model, processor, batch):
    ids = torch.tensor([processor.prompt_ids("one two")])
    assert torch.equal(
        model.generate(**batch, prompt_input_ids=ids), model.generate(**batch, prompt_input_ids=ids.expand(4, -1))
    )
    with pytest.raises(ValueError, match="2 prompts for 4 utterances"):
        model.generate(**batch, prompt_input_ids=ids.expand(2, -1))


def test_given_prompts_of_different_lengths(model, processor, waveforms):
    """A batch with two prompts is two batches with one each."""
    prompts = ["Transcribe the following audio:", "stop the music please turn on the light"]
    both = processor.apply_transcription_request(waveforms[:2], prompt=prompts)
    together = model.generate(**both, max_new_tokens=6)
    for i, prompt in enumerate(prompts):
        alone = model.generate(**processor.apply_transcription_request(waveforms[i], prompt=prompt), max_new_tokens=6)
        assert alone[0].tolist() == together[i, : alone.shape[1]].tolist()


def test_the_default_prompt_is_the_processors(model, processor, waveforms):
    asked = processor.apply_transcription_request(waveforms[:2])
    assert torch.equal(model.generate(**asked), model.generate(**processor(audio=waveforms[:2])))


def test_no_input_is_named(model):
    with pytest.raises(ValueError, match="input_features and speech_states"):
        model.generate()


@pytest.mark.parametrize("settings", [{}, {"use_llm": False}, {"first_token_guidance": False}, {"max_new_tokens": 1}])
@pytest.mark.parametrize("skip_prompt", [True, False])
def test_a_streamer_gets_the_whole_transcript(model, processor, waveforms, settings, skip_prompt):
    inputs = processor(audio=waveforms[0])
    text = processor.decode(model.generate(**inputs, **settings)[0])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True, timeout=60)
    model.generate(**inputs, **settings, streamer=streamer)
    assert text and "".join(streamer) == text


def test_streaming_more_than_one_row_is_refused(model, processor, waveforms):
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate(**processor(audio=waveforms[:2]), streamer=TextIteratorStreamer(processor.tokenizer))


def test_scores_are_those_of_the_loop_that_wrote(model, processor, waveforms):
    inputs = processor(audio=waveforms)
    output = model.generate(**inputs, return_dict_in_generate=True, output_scores=True)
    # Greedy: what was written after the guiding token is the argmax of the scores, until the end of the turn.
    choices = torch.stack(output.scores, dim=1).argmax(-1)
    decoded = output.sequences[:, 1:]
    pad = model.generation_config.pad_token_id
    assert decoded.shape == choices.shape
    assert ((decoded == choices) | (decoded == pad)).all()
    stage1 = model.generate(**inputs, use_llm=False, return_dict_in_generate=True, output_scores=True)
    first = torch.stack(stage1.scores, dim=1).argmax(-1)[:, 0]
    assert torch.equal(first, stage1.sequences[:, 0])


def test_scores_of_beams_have_a_row_each(model, processor, waveforms):
    output = model.generate(
        **processor(audio=waveforms[:2]),
        num_beams=3,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert len(output.sequences) == len(output.sequences_scores) == len(output.beam_indices) == 4
    assert output.scores[0].shape[0] == 6
    assert model.compute_transition_scores(output.sequences, output.scores, output.beam_indices).shape[0] == 4


def test_static_cache_writes_the_same(model, processor, waveforms):
    inputs = processor(audio=waveforms)
    assert torch.equal(model.generate(**inputs, cache_implementation="static"), model.generate(**inputs))


@pytest.mark.medium
@pytest.mark.parametrize("part", ["encoder", "bridge", "language_model"])
def test_parts_compile_without_graph_breaks(build_model, processor, waveforms, part):
    inputs = processor(audio=waveforms[:2], text=["turn on the light", "one two three"])
    whole = build_model()
    expected = whole(**inputs).logits
    getattr(whole, part).compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(**inputs).logits, expected)


@pytest.mark.parametrize("llm_inputs", ["nearest", "continuous"])
@pytest.mark.parametrize("draft", ["right", "half", "random"])
def test_a_draft_head_changes_nothing_but_the_work(build_model, processor, waveforms, monkeypatch, draft, llm_inputs):
    model = build_model(draft_vocabulary=list(range(3, 250)), llm_inputs=llm_inputs)
    inputs = processor(audio=waveforms)
    plain = model.generate(**inputs, verify=False, return_dict_in_generate=True)
    assert plain.alignment_forwards is None and plain.alignment_mask.sum(-1).min() > 4
    if draft != "random":
        ids = plain.alignment_sequences.clone()
        if draft == "half":
            ids[:, ::2] = 7
        monkeypatch.setattr(model.draft_head, "decode", lambda *speech: (ids, plain.alignment_mask))
    verified = model.generate(**inputs, return_dict_in_generate=True)
    assert torch.equal(verified.sequences, plain.sequences)
    assert torch.equal(verified.alignment_sequences, plain.alignment_sequences)
    torch.testing.assert_close(verified.aligned_embeds, plain.aligned_embeds, rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(verified.alignment_distances, plain.alignment_distances, rtol=1e-3, atol=2e-4)
    tokens = plain.alignment_mask.sum(-1)
    work = verified.alignment_forwards
    if draft == "right":
        assert (verified.alignment_accepted_tokens + work >= tokens).all() and (work <= 2).all()
        assert (verified.alignment_rejected_tokens == 0).all()
    else:
        assert (verified.alignment_accepted_tokens < tokens).all() and verified.alignment_rejected_tokens.any()
    stage_1 = model.generate(**inputs, use_llm=False, return_dict_in_generate=True)
    assert torch.equal(stage_1.alignment_forwards, work)


def test_other_searches_do_without_the_draft_head(build_model, processor, waveforms):
    model = build_model(draft_vocabulary=list(range(3, 250)))
    inputs = processor(audio=waveforms[0])
    for settings in ({"num_beams": 2}, {"do_sample": True}):
        output = model.generate(**inputs, use_llm=False, return_dict_in_generate=True, **settings)
        assert output.alignment_forwards is None and output.sequences.shape[1] > 0
