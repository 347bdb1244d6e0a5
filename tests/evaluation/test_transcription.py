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
