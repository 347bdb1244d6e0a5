"""An explanation shows what the model did."""

import json
import sys

import numpy as np
import pytest
import soundfile
import torch
from matplotlib import image
from transformers.modeling_outputs import BaseModelOutput
from typer.testing import CliRunner

from seam.__main__ import app
from seam.evaluation.explanation import (
    EOA,
    Change,
    Edit,
    Explanation,
    Stage1Token,
    Token,
    edits,
    explain,
    token_spans,
    token_text,
)
from seam.evaluation.explanation_views import decision, plot_explanation, record, summary, table, visible
from seam.modeling_seam import SeamForSpeechRecognition, load_checkpoint
from seam.modeling_seam.token_table import start_ids
from seam.tests.helpers import forked
from seam.tests.helpers.shipped import RECORDINGS, TINY

GIVEN, KEPT, SUBSTITUTED, INSERTED, DELETED = Change


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(str(TINY))


def recording(number: int):
    return RECORDINGS / "audio" / f"{number:06}.wav"


@pytest.fixture(scope="module")
def explanations(shipped) -> list[Explanation]:
    return [explain(*shipped, recording(number)) for number in range(10)]


@pytest.fixture(scope="module")
def generated(shipped):
    model, processor = shipped
    return [
        model.generate(**processor(audio=recording(number)), return_dict_in_generate=True, output_scores=True)
        for number in range(10)
    ]


# ---- against `generate` ----


@pytest.mark.oldest
def test_tokens_and_distances_are_those_of_generate(explanations, generated):
    for explanation, output in zip(explanations, generated, strict=True):
        assert explanation.ended and explanation.stage1_tokens[-1].text == EOA
        assert [token.id for token in explanation.stage1_tokens[:-1]] == output.alignment_sequences[0].tolist()
        distances = [token.distance for token in explanation.stage1_tokens[:-1]]
        assert np.allclose(distances, output.alignment_distances[0], atol=1e-5)


def test_the_runner_up_is_the_second_nearest_of_all_tokens(shipped, explanations, generated):
    model, processor = shipped
    for explanation, output in zip(explanations, generated, strict=True):
        distances = model.lookup.distances(output.aligned_embeds[0])
        for row, token in zip(distances, explanation.stage1_tokens, strict=False):
            first, second = row.argsort()[:2].tolist()
            assert (first, second) == (token.id, token.runner_up.id)
            assert row[second] == pytest.approx(token.runner_up_distance, abs=1e-5)
            assert token.distance < token.runner_up_distance


def test_texts_are_those_of_the_processor(shipped, explanations, generated):
    _, processor = shipped
    for explanation, output in zip(explanations, generated, strict=True):
        assert explanation.stage1 == "".join(token.text for token in explanation.stage1_tokens[:-1])
        assert explanation.text == processor.decode(output.sequences[0])
        assert explanation.text == "".join(token.text for token in explanation.tokens)


@pytest.mark.oldest
def test_the_attention_is_that_of_the_aligner(shipped):
    """Its mean over the heads, layer by layer, against the keys and queries themselves."""
    model, processor = shipped
    explanation = explain(model, processor, recording(4))
    layers = model.config.aligner_config.decoder_layers
    states, mask = model.encode(**processor(audio=recording(4)))
    assert explanation.attention.shape == (layers, len(explanation.stage1_tokens), states.shape[1])
    caught = []
    layer = model.bridge.layers[-1]
    hook = layer.encoder_attn_layer_norm.register_forward_hook(lambda *called: caught.append(called[-1]))
    try:
        model.teacher_forced(states, mask, torch.tensor([[token.id for token in explanation.stage1_tokens[:-1]]]))
    finally:
        hook.remove()
    (hidden,), attention = caught, layer.encoder_attn
    with torch.no_grad():
        heads = attention.num_heads
        query = (attention.q_proj(hidden) * attention.scaling)[0].unflatten(-1, (heads, -1)).transpose(0, 1)
        key = attention.k_proj(states)[0].unflatten(-1, (heads, -1)).transpose(0, 1)
        weights = (query @ key.transpose(1, 2)).softmax(-1).mean(0)
    assert np.allclose(explanation.attention[-1], weights, atol=1e-5)


def test_nothing_is_attended_to_beyond_the_audio(explanations):
    for explanation in explanations:
        assert np.allclose(explanation.attention.sum(-1), 1, atol=1e-5) and (explanation.attention >= 0).all()
        last_start = (explanation.attention.shape[-1] - 1) * explanation.state_seconds
        assert last_start < explanation.seconds
        assert explanation.state_seconds == pytest.approx(0.02)  # of every Whisper
        frames = explanation.log_mel.shape[1] * explanation.frame_seconds
        assert abs(frames - explanation.seconds) <= explanation.frame_seconds


def test_the_attention_implementation_is_put_back(shipped, monkeypatch):
    model, processor = shipped
    for implementation in ("sdpa", "eager"):
        model.bridge.set_attn_implementation(implementation)
        explain(model, processor, recording(5))
        assert model.bridge.config._attn_implementation == implementation
    model.bridge.set_attn_implementation("sdpa")

    def fail(*_args, **_kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "_teacher_forced", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        explain(model, processor, torch.zeros(16000))  # Stage 1 emits no token, so that nothing else is teacher-forced
    assert model.bridge.config._attn_implementation == "sdpa"


# ---- spans ----


def test_spans_follow_the_attention_and_not_its_rests():
    attention = np.zeros((3, 10))
    attention[:, 0], attention[:, 9] = 0.35, 0.15  # rests that say nothing: the centre of mass would be alike for all
    attention[0, 0:3] += 0.2
    attention[1, 3:7] += 0.125
    attention[2, 7:10] += 0.2
    assert token_spans(attention) == [(0, 3), (3, 7), (7, 10)]


def test_more_tokens_than_states_share_them():
    found = token_spans(np.full((5, 2), 0.5))
    assert found[0][0] == 0 and found[-1][1] == 2
    assert all(0 <= start <= end <= 2 for start, end in found)
    assert token_spans(np.empty((0, 4))) == []


def test_tokens_lie_within_the_recording_one_after_another(explanations):
    for explanation in explanations:
        *tokens, end = explanation.stage1_tokens
        assert end.start is None and end.end is None
        assert tokens[0].start == 0 and tokens[-1].end == explanation.seconds
        assert all(one.end == other.start for one, other in zip(tokens, tokens[1:], strict=False))
        assert all(token.start <= token.end for token in tokens)


def test_a_token_emitted_twice_but_spoken_once_has_an_empty_span(explanations):
    """The reference is "two seven five two seven"."""
    assert explanations[9].stage1 == "two seven five five two seven"
    assert [token.end > token.start for token in explanations[9].stage1_tokens[:-1]] == [
        True,
        True,
        True,
        False,
        True,
        True,
    ]


def test_words_of_a_person_are_found_where_they_were_spoken(shipped, shared):
    """Recordings of single digits, joined: where each one lies is known."""
    _, processor = shipped
    words = {"seven": 7, "two": 2, "nine": 9, "five": 5, "eight": 8}
    pieces, spans, position = [], [], 0
    for digit in words.values():
        waveform = processor.load_audio(shared / "speech" / "fsdd" / "jackson" / f"{digit}_jackson_10.flac")
        pieces += [waveform, np.zeros(1600, np.float32)]
        spans.append((position / 16000, (position + len(waveform)) / 16000))
        position += len(waveform) + 1600
    explanation = explain(*shipped, np.concatenate(pieces))
    assert explanation.stage1 == " ".join(words)
    for token, (start, end) in zip(explanation.stage1_tokens, spans, strict=False):
        assert start < (token.start + token.end) / 2 < end


# ---- changes ----


@pytest.mark.parametrize(
    ("stage1_ids", "transcript_ids", "expected"),
    [
        ([7, 8], [7, 8], [(GIVEN, 0, 0), (KEPT, 1, 1)]),
        ([7, 8, 9], [7, 5, 9], [(GIVEN, 0, 0), (SUBSTITUTED, 1, 1), (KEPT, 2, 2)]),
        ([7, 8], [7, 5, 8], [(GIVEN, 0, 0), (INSERTED, None, 1), (KEPT, 1, 2)]),
        ([7, 8, 9], [7, 9], [(GIVEN, 0, 0), (DELETED, 1, None), (KEPT, 2, 1)]),
        ([7, 7], [7], [(GIVEN, 0, 0), (DELETED, 1, None)]),
        ([7], [7, 7], [(GIVEN, 0, 0), (INSERTED, None, 1)]),
        ([], [], []),
        (
            [1, 2, 3, 4, 5],
            [1, 9, 3, 5, 6],
            [(GIVEN, 0, 0), (SUBSTITUTED, 1, 1), (KEPT, 2, 2), (DELETED, 3, None), (KEPT, 4, 3), (INSERTED, None, 4)],
        ),
    ],
)
def test_edits(stage1_ids, transcript_ids, expected):
    assert edits(stage1_ids, transcript_ids) == [Edit(*one) for one in expected]


def test_a_token_that_the_llm_inserted_is_marked(explanations):
    explanation = explanations[4]
    assert explanation.stage1 == "call five one five six one"
    assert explanation.text == "call five one five six one one"
    assert [edit.change for edit in explanation.edits] == [GIVEN, *[KEPT] * 5, INSERTED, None]
    assert explanation.tokens[explanation.edits[6].index].text == " one"


def test_the_runner_up_can_be_right(explanations):
    """The reference is "make the bedroom lamp blue please"."""
    token = explanations[3].stage1_tokens[4]
    assert (token.text, token.runner_up.text) == (" red", " blue")
    assert token.runner_up_distance - token.distance < 0.1


# ---- other audio and other models ----


def test_silence_is_explained(shipped, tmp_path):
    explanation = explain(*shipped, np.zeros(16000, np.float32))
    assert [token.text for token in explanation.stage1_tokens] == [EOA]
    assert explanation.edits == (Edit(None, 0, None),) and explanation.text == ""
    assert "Stage 1 found no words" in summary(explanation)[-1]
    plot_explanation(explanation, tmp_path / "silence.png", "silence")
    assert image.imread(tmp_path / "silence.png").ndim == 3


def test_audio_longer_than_the_window_is_refused(shipped):
    with pytest.raises(ValueError, match=r"5.0 s of audio: one utterance of at most 4 s can be explained"):
        explain(*shipped, np.zeros(80000, np.float32))


@pytest.mark.parametrize("which", ["model", "table_model"])
def test_an_aligner_that_does_not_end(request, which, processor, waveforms):
    """Random weights seldom find <EOA>; the aligner has positions for <BOA> and 23 tokens, less Whisper's prompt."""
    model, limit = request.getfixturevalue(which), {"model": 23, "table_model": 20}[which]
    found = [explain(model, processor, waveform) for waveform in waveforms]
    endless = [explanation for explanation in found if not explanation.ended]
    assert endless
    for explanation in endless:
        assert len(explanation.stage1_tokens) == explanation.attention.shape[1] == limit
        assert EOA not in [token.text for token in explanation.stage1_tokens]
        assert f"positions for {limit} tokens only" in summary(explanation)[-1]


def test_without_a_mask_the_spans_stay_within_the_audio(build_model, processor, waveforms):
    explanation = explain(build_model(mask_speech_padding=False), processor, waveforms[0])
    assert explanation.attention.shape[-1] == 100  # the whole window of 2 s
    assert explanation.seconds == 0.4
    assert all(token.end <= 0.4 for token in explanation.stage1_tokens if token.end is not None)


@torch.no_grad()
def test_whispers_prompt_and_the_margin_are_no_part_of_it(build_table_model, processor, waveforms):
    """The attention is that with which the tokens were predicted; no token lies in the margin."""
    model = build_table_model(speech_margin=0.3, encoder_window="audio")
    explanation = explain(model, processor, waveforms[1])
    assert explanation.seconds == 12345 / 16000 and explanation.attention.shape[-1] == 54  # 39 states, and 15
    assert max(token.end for token in explanation.stage1_tokens if token.end is not None) <= explanation.seconds
    states, _ = model.encode(**processor(audio=waveforms[1]))
    ids = [*start_ids(model.config), *(token.id for token in explanation.stage1_tokens[:-1])]
    model.set_attn_implementation("eager")
    output = model.bridge(
        decoder_input_ids=torch.tensor([ids]),
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        lookup=model.lookup,
        output_attentions=True,
    )
    for own, layer in zip(explanation.attention, output.cross_attentions, strict=True):
        np.testing.assert_allclose(own, layer[0, :, 3:].mean(0), rtol=1e-4, atol=1e-6)


# ---- text and picture ----


def by_hand() -> Explanation:
    """Return an explanation of 0.1 s: "the red" from Stage 1, "the $blue$ now" from the LLM."""
    stage1_tokens = (
        Stage1Token(1, "the", 0.125, Token(4, " a"), 0.5, 0.0, 0.04),
        Stage1Token(2, " red", 0.25, Token(3, " $blue$"), 0.375, 0.04, 0.1),
        Stage1Token(9, EOA, 0.0625, Token(5, "\n"), 2.0, None, None),
    )
    tokens = (Token(1, "the"), Token(3, " $blue$"), Token(6, " now"))
    changes = (Edit(GIVEN, 0, 0), Edit(SUBSTITUTED, 1, 1), Edit(INSERTED, None, 2), Edit(None, 2, None))
    attention = np.full((2, 3, 5), 0.2)
    return Explanation(
        0.1, "the red", "the $blue$ now", stage1_tokens, tokens, changes, True, attention, 0.02, np.zeros((8, 10)), 0.01
    )


def test_spaces_and_controls_are_visible():
    assert [visible(Token(0, text)) for text in (" red", "red", "a b", "\n", "né")] == [
        "␣red",
        "red",
        "a␣b",
        r"\n",
        "né",
    ]


def test_a_token_that_is_part_of_a_character_is_spelt_as_in_the_vocabulary(shipped):
    _, processor = shipped
    half = processor.tokenizer("é", add_special_tokens=False).input_ids[0]
    assert "\N{REPLACEMENT CHARACTER}" in processor.decode([half])  # otherwise this tests nothing
    assert token_text(processor, half) == "Ã"


def test_table():
    columns = [list(column.cells) for column in table(by_hand()).columns]
    assert columns == [
        ["0.00–0.04", "0.04–0.10", "", ""],
        ["the", "␣red", "", EOA],
        ["0.1250", "0.2500", "", "0.0625"],
        ["␣a", "␣$blue$", "", r"\n"],
        ["0.5000", "0.3750", "", "2.0000"],
        ["the (given: first token guidance)", "→ ␣$blue$ (substituted)", "+ ␣now (inserted)", ""],
    ]
    assert decision(by_hand(), Edit(DELETED, 1, None)) == "− (deleted)"


def test_record_is_json():
    row = json.loads(json.dumps(record(by_hand())))
    assert row["heard"][1] == {
        "id": 2,
        "text": " red",
        "distance": 0.25,
        "runner_up": {"id": 3, "text": " $blue$", "distance": 0.375},
        "start": 0.04,
        "end": 0.1,
    }
    assert row["edits"][1:3] == [
        {"change": "substituted", "heard": 1, "written": 1},
        {"change": "inserted", "heard": None, "written": 2},
    ]
    assert (row["stage1"], row["text"], row["ended"]) == ("the red", "the $blue$ now", True)


def test_the_picture_grows_with_the_tokens(explanations, tmp_path):
    shapes = []
    for name, explanation in (("hand", by_hand()), ("five", explanations[4])):
        plot_explanation(explanation, tmp_path / f"{name}.png", name)
        shapes.append(image.imread(tmp_path / f"{name}.png").shape)
    assert shapes[0][1] == shapes[1][1] and shapes[0][0] < shapes[1][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["five.png", "hand.png"]


# ---- the command ----


@pytest.fixture
def seam(tmp_path, monkeypatch):
    """Run the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["explain", "--model", str(TINY), *map(str, arguments)])


@pytest.mark.medium
def test_command(tmp_path):
    command = [sys.executable, "-m", "seam", "explain", "--model", str(TINY), str(recording(4))]
    done = forked.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("call (given: first token guidance)", "+ ␣one (inserted)", "0.34–0.76", EOA, "000004.explain.png"):
        assert part in done.stdout
    assert done.stdout.splitlines()[-2] == "transcript: call five one five six one one"
    assert [path.name for path in tmp_path.iterdir()] == ["000004.explain.png"]
    assert image.imread(tmp_path / "000004.explain.png").shape[1] > 1000


def test_command_as_json(seam, tmp_path):
    done = seam(recording(3), "--json", "--out", tmp_path / "red.png")
    assert done.exit_code == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["file"] == str(recording(3)) and row["picture"] == str(tmp_path / "red.png")
    assert row["heard"][4]["runner_up"]["text"] == " blue"
    assert image.imread(tmp_path / "red.png").ndim == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.wav"], "missing.wav: no such audio file"),
        (["long.wav"], "one utterance of at most 4 s can be explained"),
        (["long.wav", "--out", "picture.pdf"], "--out is picture.pdf; accepted: a name that ends with .png"),
        (["long.wav", "--out", "nowhere/picture.png"], "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, seam, tmp_path):
    soundfile.write(tmp_path / "long.wav", np.zeros(80000), 16000)
    done = seam(*arguments)
    assert done.exit_code == 1 and not done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["long.wav"]


def test_stage_1_alone_is_explained_without_an_llm(backbones, processor, waveforms):
    torch.manual_seed(1)
    alone = SeamForSpeechRecognition.from_backbones(*backbones, processor, alignment_only=True).eval()
    explanation = explain(alone, processor, waveforms[0])
    assert [edit.change for edit in explanation.edits] == [None] * len(explanation.stage1_tokens)
    assert explanation.stage1 == explanation.text
