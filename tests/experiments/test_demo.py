"""From nothing to a recogniser of spoken digits, with the classes and the code of the demo."""

import json

import pytest
import soundfile

from seam.data.manifest import Utterance, read_manifest
from seam.evaluation.hypotheses import SYSTEMS, TABLE_1
from seam.evaluation.scoring import word_errors
from seam.evaluation.transcription import Transcription, transcribe
from seam.experiments import demo
from seam.experiments.demo import compare_systems
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.train.recipe import RecipeError, build

WHISPER, STAGE1, FULL, GUIDED = (SYSTEMS[name].row for name in TABLE_1)

pytest.importorskip("espeakng_loader", reason="the demo extra is not installed")


def values(folder, **speech):
    def training(steps, rate):
        return {
            "max_steps": steps,
            "learning_rate": rate,
            "per_device_train_batch_size": 32,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(steps // 20, 1),
            "logging_steps": 100,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }

    encoder = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 256}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 256, "max_target_positions": 32}
    language_model = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.08,
    }
    return {
        "output_dir": str(folder),
        "speech": {
            "window_seconds": 3,
            "commands": 0,
            "digits": 1500,
            "words": 0,
            "clean_share": 1.0,
            "test": 60,
            **speech,
        },
        "llm": {"vocab_size": 330, "sentences": 3000, "sizes": language_model, "training": training(600, 4e-3)},
        "whisper": {"sizes": {**encoder, **decoder, "num_mel_bins": 40}, "training": training(900, 4e-3)},
        "alignment": {
            "config": {"aligner_config": {"d_model": 64, **decoder, "decoder_layers": 2}},
            "training": training(800, 4e-3),
        },
        "instruction": {"training": training(100, 1e-3)},
        "refinement": {"masking_probability": 0.02, "deletion_probability": 0.03, "training": training(300, 1e-3)},
    }


# Longer than the others may take: it trains five models one after the other, on a slow machine for over 300 s.
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_learns_to_transcribe_unseen_sentences_of_unseen_voices(tmp_path):
    table = demo.main(build(demo.DemoRecipe, values(tmp_path)))
    for system in (STAGE1, GUIDED):
        assert table["wer"][system]["unseen voices"] < 20, table["wer"]
    model = SeamForSpeechRecognition.from_pretrained(tmp_path / "model")
    processor = SeamProcessor.from_pretrained(tmp_path / "model")
    test = read_manifest(tmp_path / "tests" / "test-unseen voices" / "manifest.jsonl")
    hypotheses = [one.text for one in transcribe(model, processor, [one.audio for one in test])]
    references = [one.text for one in test]
    assert word_errors(references, hypotheses).error_rate == pytest.approx(table["wer"][GUIDED]["unseen voices"])
    wrong_audio = hypotheses[1:] + hypotheses[:1]
    assert word_errors(references, wrong_audio).error_rate > 70
    # Given again, the command repeats nothing.
    before = (tmp_path / "parts.json").read_text()
    assert demo.main(build(demo.DemoRecipe, values(tmp_path))) == table
    assert (tmp_path / "parts.json").read_text() == before


def test_a_wrong_stage_setting_is_found_before_anything_is_made(tmp_path):
    wrong = values(tmp_path / "out")
    wrong["refinement"]["masking_probablity"] = 0.1
    with pytest.raises(RecipeError, match="refinement.masking_probablity; did you mean refinement.masking_probability"):
        demo.main(build(demo.DemoRecipe, wrong))
    assert not (tmp_path / "out").exists()


def test_missing_people_are_found_before_anything_is_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such manifest"):
        demo.main(build(demo.DemoRecipe, values(tmp_path / "out", people=str(tmp_path / "nobody"))))
    again = {"speech": {"people": str(tmp_path / "nobody")}, "training": {"max_steps": 1, "use_cpu": True}}
    with pytest.raises(FileNotFoundError, match="no such manifest"):
        demo.main(build(demo.DemoRecipe, {**values(tmp_path / "out"), "second_round": again}))
    assert not (tmp_path / "out").exists()


def test_steps_are_repeated_when_settings_change(tmp_path):
    done = []

    def run(settings, broken=None):
        steps = demo.Steps(tmp_path)

        def work(name):
            if name == broken:
                raise KeyboardInterrupt
            done.append(name)

        for name in ("first", "second", "third"):
            steps.run(name, settings.get(name), lambda name=name: work(name))

    run({})
    assert done == ["first", "second", "third"]
    run({})
    assert len(done) == 3
    run({"second": {"steps": 2}})
    assert done[3:] == ["second", "third"]
    with pytest.raises(KeyboardInterrupt):
        run({"first": {"steps": 3}}, broken="second")
    run({"first": {"steps": 3}})
    assert done[5:] == ["first", "second", "third"]
    assert set(json.loads((tmp_path / "parts.json").read_text())) == {"first", "second", "third"}


def test_systems_are_compared_on_the_same_utterances(model, processor, waveforms, tmp_path, monkeypatch):
    tests = {"tones": []}
    for index, waveform in enumerate(waveforms):
        soundfile.write(tmp_path / f"{index}.wav", waveform, 16000)
        tests["tones"].append(Utterance(tmp_path / f"{index}.wav", "One two", len(waveform) / 16000))

    def fake(given, *args, **kwargs):
        if given is model:
            return transcribe(given, *args, **kwargs)
        return [Transcription(1.0, "", text, (), (), 0) for text in ["one two"] * (len(waveforms) - 1) + ["one"]]

    monkeypatch.setattr("seam.experiments.demo.transcribe", fake)
    table = compare_systems(model, processor, "whisper", None, tests)
    assert table["words"] == {"tones": 2 * len(waveforms)}
    assert table["wer"][WHISPER] == {"tones": 100 / (2 * len(waveforms))}
    low, high = table["interval"][WHISPER]["tones"]
    assert low == 0 and table["wer"][WHISPER]["tones"] < high < 50
    assert set(table["wer"]) == set(table["interval"]) == {WHISPER, STAGE1, FULL, GUIDED}
