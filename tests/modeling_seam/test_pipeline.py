"""`pipeline("automatic-speech-recognition")` with the shipped checkpoint, in this process."""

from unittest.mock import patch

import numpy as np
import pytest
import soundfile
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoFeatureExtractor,
    AutomaticSpeechRecognitionPipeline,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)
from transformers.utils import logging

from seam.data.manifest import read_manifest
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.modeling_seam.pipeline import SeamPipeline
from seam.tests.helpers.shipped import RECORDINGS, TINY

pytestmark = pytest.mark.oldest

TASK = "automatic-speech-recognition"


@pytest.fixture(scope="module")
def files():
    return [str(one.audio) for one in read_manifest(RECORDINGS / "manifest.jsonl")]


@pytest.fixture(scope="module")
def waveforms(files):
    return [soundfile.read(file, dtype="float32")[0] for file in files]


@pytest.fixture(scope="module")
def shipped():
    return SeamForSpeechRecognition.from_pretrained(TINY), SeamProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def asr(shipped):
    model, processor = shipped
    return SeamPipeline(model=model, processor=processor, task=TASK)


@pytest.fixture(scope="module")
def texts(asr, files):
    return [asr(file)["text"] for file in files]


def resampled(asr, waveform, rate):
    import librosa

    return librosa.resample(waveform, orig_sr=asr.processor.sampling_rate, target_sr=rate)


def words(outputs) -> list[str]:
    return [output["text"] for output in outputs]


def test_it_says_what_generate_says(asr, shipped, files, texts):
    model, processor = shipped
    ids = model.generate(**processor(audio=files))
    assert texts == [text.strip() for text in processor.batch_decode(ids)]
    assert len(set(texts)) > 5 and all(texts)


def test_every_kind_of_input(asr, files, waveforms, texts):
    file, waveform, text = files[0], waveforms[0], texts[0]
    with open(file, "rb") as opened:
        data = opened.read()
    for source in (file, data, waveform, torch.tensor(waveform), np.stack([waveform, waveform], axis=1)):
        assert asr(source) == {"text": text}
    for key in ("array", "raw"):
        assert asr({key: waveform, "sampling_rate": 16000}) == {"text": text}
    for one in ({"path": str(file), "bytes": None}, {"path": None, "bytes": data}):
        assert asr(one) == {"text": text}
    with pytest.raises(ValueError, match="Give several recordings as a list of waveforms"):
        asr(np.stack([waveform, waveform]))


@pytest.mark.parametrize("rate", [8000, 44100])
def test_other_rates(asr, waveforms, texts, rate):
    for waveform, text in zip(waveforms[:3], texts, strict=False):
        again = resampled(asr, waveform, rate)
        array, raw, bare = (
            asr({"array": again, "sampling_rate": rate}),
            asr({"raw": again, "sampling_rate": rate}),
            asr(again, sampling_rate=rate),
        )
        assert array == raw == bare
        if rate > 16000:  # at 8 kHz half of the spectrum is gone
            assert array == {"text": text}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_are_as_one_by_one(asr, files, texts, batch_size):
    assert words(asr(files, batch_size=batch_size)) == texts


def test_a_list_is_batched_by_length(asr, files, waveforms, texts):
    """Of every kind, and long audio of two pieces, the second of which is the longer one."""
    long = np.concatenate([waveforms[0], np.zeros(8000, np.float32), waveforms[4]])
    pieces = [len(piece) for piece in asr.processor.split(long)]
    assert len(pieces) == 2 and pieces[0] < pieces[1]
    sources = [files[0], long, {"raw": waveforms[1], "sampling_rate": 16000}, waveforms[2], *files[3:]]
    alone = [asr(source)["text"] for source in sources]
    assert alone[0] == texts[0] and alone[2:] == texts[1:]
    with patch.object(asr.model, "generate", wraps=asr.model.generate) as generate:
        together = asr(sources, batch_size=4)
    batches = [call.kwargs["attention_mask"].sum(-1).tolist() for call in generate.call_args_list]
    frames = sorted((-(-samples // 160) for samples in [*pieces, *map(len, waveforms)]), reverse=True)
    assert batches == [frames[:4], frames[4:8], frames[8:]] and len(frames) == 12
    assert words(together) == alone


def test_no_more_of_a_list_is_read_than_is_sorted_at_once(asr, files, waveforms, texts):
    events = []
    load, generate = asr.processor.load_audio, asr.model.generate

    def loaded(source, *args):
        if isinstance(source, str):
            events.append(files.index(source))
        return load(source, *args)

    def generated(**kwargs):
        events.append("batch")
        return generate(**kwargs)

    with (
        patch.object(asr.processor, "load_audio", loaded),
        patch.object(asr.model, "generate", generated),
        patch("seam.modeling_seam.pipeline.SORTED_BATCHES", 2),
    ):
        outputs = asr(files[:7], batch_size=2)
    assert words(outputs) == texts[:7]
    assert events == [0, 1, 2, 3, "batch", "batch", 4, 5, 6, "batch", "batch"]


def test_a_list_is_resampled_once(asr, waveforms):
    again = [resampled(asr, waveform, 8000) for waveform in waveforms[:3]]
    together = asr(again, sampling_rate=8000, batch_size=2)
    assert together == [asr(one, sampling_rate=8000) for one in again]


def test_a_bad_member_of_a_list_is_named(asr, files):
    for batch_size in (1, 2):
        with pytest.raises(FileNotFoundError, match="missing.wav: no such audio file"):
            asr([*files[:2], "missing.wav"], batch_size=batch_size)
        with pytest.raises(ValueError, match="the given ndarray holds no audio samples"):
            asr([*files[:2], np.zeros(0, np.float32)], batch_size=batch_size)


def test_a_dataset_is_answered_as_it_is_read(asr, files, waveforms, texts):
    given = []

    class Recordings(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            given.append(index)
            return {"raw": waveforms[index], "sampling_rate": 16000}

    outputs = iter(asr(Recordings(), batch_size=2))
    assert next(outputs) == {"text": texts[0]} and max(given) <= 2
    assert [next(outputs)["text"] for _ in range(5)] == texts[1:6]


def test_an_empty_generator_has_no_answers(asr):
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("older pipelines look for a first member")
    assert list(asr((file for file in []), batch_size=2)) == []


def test_features_may_be_made_beside(asr, files, texts):
    assert words(asr(files[:5], batch_size=2, num_workers=1)) == texts[:5]


def test_a_generator_is_read_as_it_is_answered(asr, files, texts):
    given = []

    def audio():
        for file in files[:4]:
            given.append(file)
            yield file

    outputs = asr(audio())
    lazy = Version(transformers.__version__) >= Version("5.23")  # older pipelines make a list of a generator first
    assert len(given) <= 1 or not lazy  # a look at what it is
    assert next(iter(outputs)) == {"text": texts[0]} and (len(given) < 4 or not lazy)
    assert words(asr(audio(), batch_size=2)) == texts[:4]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_long_audio_loses_and_doubles_no_word(asr, waveforms, texts, batch_size):
    """Sentences of one window each, that the tiny model understands after a moment of silence, too."""
    pause = np.zeros(int(0.6 * 16000), np.float32)
    long_enough = [index for index, waveform in enumerate(waveforms) if len(waveform) > 1.8 * 16000]
    one_each = [i for i in long_enough if asr(np.concatenate([pause[:1600], waveforms[i]]))["text"] == texts[i]]
    assert len(one_each) > 3
    long = np.concatenate([part for index in one_each for part in (waveforms[index], pause)])
    assert len(long) > 2 * asr.processor.max_seconds * 16000
    pieces = asr.processor.split(long)
    alone = " ".join(filter(None, (asr(piece)["text"] for piece in pieces)))
    together, short = asr([long, waveforms[0]], batch_size=batch_size)
    assert together["text"] == alone and short["text"] == texts[0]
    assert together["text"].split() == " ".join(texts[index] for index in one_each).split()


def test_a_prompt_of_ones_own(asr, files, texts):
    assert asr(files[0], prompt=asr.processor.instruction) == {"text": texts[0]}
    other = asr(files[:2], prompt="Stop!", batch_size=2)
    assert words(other) == [asr(file, prompt="Stop!")["text"] for file in files[:2]]
    assert words(asr(files[:1])) == texts[:1]  # said for one call only


def test_generate_kwargs(asr, files, texts):
    short = asr(files[0], generate_kwargs={"max_new_tokens": 3})["text"]
    assert texts[0].startswith(short) and len(short) < len(texts[0])
    assert asr(files[0], max_new_tokens=3) == {"text": short}
    assert isinstance(asr(files[0], generate_kwargs={"num_beams": 3})["text"], str)
    stage1 = asr(files[0], use_llm=False)["text"]
    assert stage1 and stage1 == asr(files[0], generate_kwargs={"use_llm": False})["text"]
    assert asr(files[0]) == {"text": texts[0]}


def test_what_it_has_no_use_for_is_named(asr, files):
    with pytest.raises(ValueError, match="return_timestamps: SEAM outputs tokens, not times"):
        asr(files[0], return_timestamps=True)
    with pytest.raises(ValueError, match="return_language: SEAM does not say"):
        asr(files[0], return_language=True)
    with pytest.raises(ValueError, match="no_such_setting"):
        asr(files[0], generate_kwargs={"no_such_setting": 1})
    with pytest.raises(FileNotFoundError, match="missing.wav"):
        asr("missing.wav")
    with pytest.raises(ValueError, match="no audio samples"):
        asr(np.zeros(0, np.float32))


def test_a_saved_pipeline_comes_back(asr, files, texts, tmp_path):
    asr.save_pretrained(tmp_path)
    again = pipeline(TASK, model=str(tmp_path), pipeline_class=SeamPipeline)
    assert isinstance(again.model, SeamForSpeechRecognition)
    assert words(again(files[:3], batch_size=3)) == texts[:3]


def test_what_whispers_scripts_say(asr, files, texts, caplog):
    logging.warning_once.cache_clear()
    assert asr(files[0], chunk_length_s=10, stride_length_s=(2, 2), return_timestamps=False) == {"text": texts[0]}
    assert "chunk_length_s, stride_length_s: without effect" in caplog.text
    caplog.clear()
    logging.warning_once.cache_clear()
    said = {"language": "en", "task": "transcribe", "condition_on_prev_tokens": False}
    assert words(asr(files[:3], batch_size=2, generate_kwargs=said, return_language=False)) == texts[:3]
    assert asr(files[0], chunk_length_s=30, ignore_warning=True) == {"text": texts[0]}
    assert "language is 'en', without effect" in caplog.text and "chunk_length_s" not in caplog.text
    with pytest.raises(ValueError, match="task is 'translate'; accepted: transcribe"):
        asr(files[0], generate_kwargs={"task": "translate"})


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, "2"])
def test_a_batch_has_a_size(asr, files, batch_size):
    for source in (files[0], files[:2], (file for file in files[:2])):
        with pytest.raises(ValueError, match=f"batch_size is {batch_size!r}; accepted: whole numbers from 1"):
            asr(source, batch_size=batch_size)


def test_no_recording_gets_the_transcript_of_another(asr, files, texts):
    for given in ({"num_return_sequences": 3, "num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        for batch_size in (1, 2):
            with pytest.raises(ValueError, match="the pipeline returns one transcript of each recording"):
                asr(files[:2], batch_size=batch_size, generate_kwargs=given)
            with pytest.raises(ValueError, match="transcripts of [12] pieces of audio"):
                asr(files[:2], batch_size=batch_size, generation_config=GenerationConfig(max_new_tokens=5, **given))
    assert words(asr(files[:2], batch_size=2, num_return_sequences=1, num_beams=2)) == texts[:2]
    with pytest.raises(ValueError, match="num_beams is 0"):
        asr(files[0], num_beams=0)


@pytest.mark.parametrize("names", [["tokenizer", "feature_extractor"], ["processor"], ["tokenizer", "processor"], []])
def test_a_loaded_model_has_its_pipeline(shipped, files, texts, names):
    """As every card of a Whisper model makes one."""
    model, processor = shipped
    parts = {name: processor if name == "processor" else getattr(processor, name) for name in names}
    asr = pipeline(TASK, model=model, **parts)
    assert type(asr) is SeamPipeline and asr.model is model
    assert words(asr(files[:3], batch_size=2)) == texts[:3]
    long = np.concatenate([soundfile.read(file, dtype="float32")[0] for file in files[:3]])
    assert len(asr(long)["text"].split()) > len(texts[0].split())


def test_parts_of_another_model_are_refused(shipped, processor, model):
    with pytest.raises(ValueError, match="tokenizer: it is not the one of the model's processor"):
        pipeline(TASK, model=shipped[0], tokenizer=processor.tokenizer)
    with pytest.raises(ValueError, match="feature_extractor: it is not the one of the model's processor"):
        pipeline(TASK, model=shipped[0], processor=shipped[1], feature_extractor=processor.feature_extractor)
    with pytest.raises(ValueError, match="processor: this model was loaded from no checkpoint"):
        pipeline(TASK, model=model, tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor)
    assert pipeline(TASK, model=model, processor=processor).processor is processor
    with pytest.raises(ValueError, match="belongs to another checkpoint"):
        pipeline(TASK, model=model, processor=shipped[1])


def test_other_models_have_the_pipeline_that_they_had(multilingual, waveforms):
    whisper = AutoModelForSpeechSeq2Seq.from_pretrained(multilingual[0])
    tokenizer = AutoTokenizer.from_pretrained(multilingual[0])
    features = AutoFeatureExtractor.from_pretrained(multilingual[0])
    for asr in (
        pipeline(TASK, model=whisper, tokenizer=tokenizer, feature_extractor=features),
        pipeline(TASK, model=multilingual[0]),
    ):
        assert type(asr) is AutomaticSpeechRecognitionPipeline and asr.type == "seq2seq_whisper"
        assert asr.tokenizer is not None and asr.feature_extractor is not None
    with pytest.raises(ValueError, match="tokenizer: .* has none that loads; give one"):
        pipeline(TASK, model=whisper, feature_extractor=features)


def test_without_trust_or_the_class_it_is_refused(asr, files, texts):
    """Even where the package is installed: transformers looks at the config of the folder only."""
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline(TASK, model=str(TINY))
    again = pipeline(TASK, model=str(TINY), pipeline_class=SeamPipeline)
    assert type(again) is SeamPipeline and words(again(files[:2])) == texts[:2]


def test_bfloat16(files, tmp_path):
    again = pipeline(TASK, model=str(TINY), dtype="bfloat16", pipeline_class=SeamPipeline)
    assert again.model.dtype == torch.bfloat16 and all(words(again(files[:2])))
    again.save_pretrained(tmp_path)
    assert "dtype" not in (tmp_path / "tokenizer_config.json").read_text()
    assert SeamForSpeechRecognition.from_pretrained(tmp_path).dtype == torch.bfloat16
