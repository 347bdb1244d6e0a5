"""The one path from audio to text."""

import numpy as np

from seam.evaluation.transcription import transcribe


def test_any_batch_size_gives_the_same_texts(model, processor, waveforms):
    one, many = (transcribe(model, processor, waveforms, batch_size=size) for size in (1, 3))
    assert one == many
    assert [round(result.seconds, 3) for result in one] == [round(len(w) / 16000, 3) for w in waveforms]


def test_long_audio_is_transcribed_piece_by_piece(model, processor, waveforms):
    quiet = np.zeros(8000, np.float32)
    long = np.concatenate([waveforms[2], quiet, waveforms[1], quiet, waveforms[3], quiet])
    pieces = processor.split(long)
    assert len(pieces) > 1
    (whole,) = transcribe(model, processor, [long])
    parts = transcribe(model, processor, pieces)
    assert whole.text == " ".join(filter(None, (part.text for part in parts)))
    assert whole.stage1 == " ".join(filter(None, (part.stage1 for part in parts)))
    assert whole.seconds == len(long) / 16000


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
    heard = [tuple(i for i in row if i not in end) for row in alone.tolist()]
    assert any(heard) and heard == [one.stage1_tokens for one in transcribe(model, processor, waveforms)]
