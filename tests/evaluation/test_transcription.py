"""The one path from audio to text."""

from unittest.mock import patch

import numpy as np
import pytest

from seam.evaluation.transcription import transcribe

pytestmark = pytest.mark.oldest


def test_any_batch_size_gives_the_same_texts(model, processor, waveforms):
    one, many = (transcribe(model, processor, waveforms, batch_size=size) for size in (1, 3))
    assert one == many
    assert [round(result.seconds, 3) for result in one] == [round(len(w) / 16000, 3) for w in waveforms]


def test_long_audio_is_transcribed_piece_by_piece(model, processor, waveforms):
    quiet = np.zeros(8000, np.float32)
    long = np.concatenate([waveforms[2], quiet, waveforms[1], quiet, waveforms[3], quiet])
    pieces = processor.split(long)
    assert len(pieces) > 1
    (joined,) = transcribe(model, processor, [long])
    results = transcribe(model, processor, pieces)
    assert joined.text == " ".join(filter(None, (result.text for result in results)))
    assert joined.stage1 == " ".join(filter(None, (result.stage1 for result in results)))
    assert joined.seconds == len(long) / 16000


def test_without_the_llm_the_text_is_stage_1s(model, processor, waveforms):
    assert all(one.text == one.stage1 for one in transcribe(model, processor, waveforms, use_llm=False))


def test_the_tokens_are_those_of_the_texts(model, processor, waveforms):
    for one in transcribe(model, processor, waveforms, batch_size=3):
        assert processor.decode(list(one.stage1_tokens)).strip() == one.stage1
        assert processor.decode(list(one.tokens)).strip() == one.text
        assert not {*one.tokens, *one.stage1_tokens} & set(processor.tokenizer.all_special_ids)
    batch = processor(audio=waveforms)
    alone = model.generate(**batch, use_llm=False)
    end = processor.tokenizer.all_special_ids
    stage1 = [tuple(i for i in row if i not in end) for row in alone.tolist()]
    assert any(stage1) and stage1 == [one.stage1_tokens for one in transcribe(model, processor, waveforms)]


def test_pieces_of_like_length_are_decoded_together_and_results_stay_in_order(model, processor, waveforms):
    silence = np.zeros(3200, np.float32)  # the cut is in the middle of its last 0.1 s: at 23200 - 800 samples
    long = np.concatenate([waveforms[2], silence, waveforms[3]])
    assert [len(piece) for piece in processor.split(long)] == [22400, 31800]
    sources = [waveforms[0], long, waveforms[3], waveforms[1]]
    with patch.object(model, "generate", wraps=model.generate) as generate:
        together = transcribe(model, processor, sources, batch_size=2)
    frames = [call.kwargs["attention_mask"].sum(-1).tolist() for call in generate.call_args_list]
    assert frames == [[199, 194], [140, 78], [40]]  # of 31800, 31000, 22400, 12345 and 6400 samples, 160 a frame
    assert together == [one for source in sources for one in transcribe(model, processor, [source])]
    assert len({one.tokens for one in together}) == len({one.stage1_tokens for one in together}) == len(sources)
    first, second = (transcribe(model, processor, [piece])[0].tokens for piece in processor.split(long))
    assert together[1].tokens == first + second != second + first


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_checkpoint_that_asks_for_several_transcripts_gives_one_of_each(
    build_model, processor, waveforms, batch_size
):
    model = build_model()
    model.generation_config.num_beams = 3
    expected = transcribe(model, processor, waveforms, batch_size)
    model.generation_config.num_return_sequences = 3
    assert [one.text for one in transcribe(model, processor, waveforms, batch_size)] == [one.text for one in expected]
