"""Checkpoints load where this package is not installed, with their own code, and only when that is trusted.

Every script runs in a process of its own, offline, in which `import seam` fails. Each start costs seconds, so a script
does all it can.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from seam.data.manifest import read_manifest
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.tests.helpers import forked, sounds
from seam.tests.helpers.hub_cache import add_to_cache
from seam.tests.helpers.shipped import RECORDINGS, TINY

pytestmark = pytest.mark.medium

ROOT = Path(__file__).parents[1]
COMMIT = "c" * 40
EVERYTHING = """
    import sys
    sys.modules["seam"] = None  # any import of it fails
    import torch
    from transformers import (
        AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq,
        AutoProcessor, AutoTokenizer, pipeline,
    )
    name, audio, expected = sys.argv[1:]

    def remote(loaded):
        assert type(loaded).__module__.startswith("transformers_modules."), type(loaded).__module__
        return loaded

    trust = {"trust_remote_code": True}
    assert remote(AutoConfig.from_pretrained(name, **trust)).model_type == "seam"
    processor = remote(AutoProcessor.from_pretrained(name, **trust))
    assert type(processor).__name__ == "SeamProcessor"
    tokenizer = AutoTokenizer.from_pretrained(name, **trust)
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    features = AutoFeatureExtractor.from_pretrained(name, **trust)
    assert features.to_dict() == processor.feature_extractor.to_dict()
    ids = set()
    for auto in (AutoModel, AutoModelForSpeechSeq2Seq, AutoModelForMultimodalLM):
        model = remote(auto.from_pretrained(name, **trust))
        assert type(model).__name__ == "SeamForSpeechRecognition" and not model.training
        ids.add(tuple(model.generate(**processor(audio=audio))[0].tolist()))
    assert len(ids) == 1 and processor.decode(ids.pop()).strip() == expected
    for options in ({}, {"dtype": "bfloat16", "device_map": "cpu"}):
        asr = remote(pipeline("automatic-speech-recognition", model=name, **trust, **options))
        text = asr(audio)["text"]
        assert text == expected if not options else text, text
    assert asr.model.dtype == torch.bfloat16
    assert pipeline(model=name, **trust)(audio)["text"] == expected  # the task is said by the config
    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    for given in (parts, {"processor": processor}, {}):
        asr = remote(pipeline("automatic-speech-recognition", model=model, **given))
        assert asr(audio)["text"] == expected
    assert sys.modules["seam"] is None
"""


@pytest.fixture(scope="module")
def audio():
    return str(read_manifest(RECORDINGS / "manifest.jsonl")[0].audio)


@pytest.fixture(scope="module")
def expected(audio):
    model, processor = SeamForSpeechRecognition.from_pretrained(TINY), SeamProcessor.from_pretrained(TINY)
    return processor.batch_decode(model.generate(**processor(audio=audio)))[0].strip()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Return the shipped checkpoint, saved again: a folder with its code."""
    folder = tmp_path_factory.mktemp("saved") / "seam-tiny.v1"  # a dot: it becomes part of a module's name
    SeamForSpeechRecognition.from_pretrained(TINY).save_pretrained(folder)
    SeamProcessor.from_pretrained(TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def run(home):
    def run(script: str, *arguments, cwd="/", **variables) -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "PYTHONPATH"))}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), **variables}
        command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
        done = forked.run(command, cwd=cwd, env=environment)
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.mark.oldest
def test_from_a_folder(run, saved, audio, expected):
    run(EVERYTHING, saved, audio, expected)


@pytest.mark.oldest
def test_a_table_and_its_language(run, build_table_model, processor, waveforms, tmp_path):
    model = build_table_model(speech_margin=0.2, encoder_window="audio")
    model.save_pretrained(tmp_path / "table")
    processor.save_pretrained(tmp_path / "table")
    audio = str(sounds.write(tmp_path / "audio.wav", waveforms[2]))
    expected = processor.batch_decode(model.generate(**processor(audio=audio), language="de"))[0].strip()
    script = """
        import sys
        sys.modules["seam"] = None  # any import of it fails
        from transformers import pipeline
        name, audio, expected = sys.argv[1:]
        asr = pipeline("automatic-speech-recognition", model=name, trust_remote_code=True)
        assert type(asr.model.bridge).__name__ == "TableAligner"
        assert asr(audio, generate_kwargs={"language": "German"})["text"] == expected
    """
    run(script, tmp_path / "table", audio, expected)


@pytest.mark.slow
def test_from_the_hubs_cache(run, home, saved, audio, expected):
    add_to_cache(home / "hub", "owner/seam-tiny.v1", saved, COMMIT)
    run(EVERYTHING, "owner/seam-tiny.v1", audio, expected)


def test_from_a_repository_of_code_with_weights_beside_it(run, tmp_path, saved, audio, expected):
    repository = tmp_path / "repository"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "checkpoints", "*.egg-info", "shared")
    shutil.copytree(ROOT, repository, ignore=ignored)
    for path in saved.iterdir():
        if path.suffix in (".json", ".jinja", ".safetensors"):
            shutil.copy(path, repository)
    run(EVERYTHING, ".", audio, expected, cwd=repository)


@pytest.mark.slow
def test_the_shipped_folder(run, audio, expected):
    run(EVERYTHING, TINY, audio, expected)


@pytest.mark.oldest
def test_without_trust_nothing_of_it_runs(run, home, saved, tmp_path):
    evil, marker = tmp_path / "evil", tmp_path / "marker"
    shutil.copytree(saved, evil)
    for path in evil.rglob("*.py"):
        path.write_text(f"open({str(marker)!r}, 'a').close()\n" + path.read_text())
    add_to_cache(home / "hub", "owner/evil", evil, COMMIT)
    script = """
    import pathlib, sys
    sys.modules["seam"] = None
    from transformers import (
        AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline,
    )
    *names, marker = sys.argv[1:]
    marker = pathlib.Path(marker)
    autos = AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq, AutoProcessor
    calls = [auto.from_pretrained for auto in autos]
    calls.append(lambda name, **options: pipeline("automatic-speech-recognition", model=name, **options))
    calls.append(lambda name, **options: pipeline(model=name, **options))
    for name in names:
        for call in calls:
            for options in ({}, {"trust_remote_code": False}):
                try:
                    call(name, **options)
                except ValueError as error:
                    assert "trust_remote_code" in str(error), error
                else:
                    raise AssertionError(f"{name} {call} was loaded")
                assert not marker.exists(), (name, call)
    AutoConfig.from_pretrained(names[0], trust_remote_code=True)
    assert marker.exists()  # it would have been seen
    """
    run(script, evil, "owner/evil", marker)


@pytest.mark.oldest
def test_with_the_package_no_trust_is_needed(run, saved, tmp_path, audio, expected):
    marked = tmp_path / "marked"
    shutil.copytree(saved, marked)
    for path in marked.rglob("*.py"):
        path.write_text("raise AssertionError('code of the folder')\n")
    script = """
    import sys
    import seam.modeling_seam
    from transformers import (
        AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline,
    )
    from seam.modeling_seam.pipeline import SeamPipeline
    marked, saved, audio, expected = sys.argv[1:]
    for auto in (AutoConfig, AutoProcessor, AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq):
        for options in ({}, {"trust_remote_code": False}):
            assert type(auto.from_pretrained(marked, **options)).__module__.startswith("seam.")
    asr = pipeline("automatic-speech-recognition", model=marked, pipeline_class=SeamPipeline)
    assert type(asr.model).__module__.startswith("seam.") and asr(audio)["text"] == expected
    # Both in one process: the folder's own code beside the package.
    asr = pipeline("automatic-speech-recognition", model=saved, trust_remote_code=True)
    assert asr(audio)["text"] == expected
    """
    run(script, marked, saved, audio, expected, PYTHONPATH=os.pathsep.join(sys.path))


@pytest.mark.slow
def test_saved_by_remote_code_it_loads_again(run, saved, tmp_path, audio, expected):
    script = """
    import sys
    sys.modules["seam"] = None
    from transformers import AutoModel, AutoProcessor, pipeline
    saved, again, audio, expected = sys.argv[1:]
    asr = pipeline("automatic-speech-recognition", model=saved, trust_remote_code=True)
    asr.save_pretrained(again)
    AutoModel.from_pretrained(saved, trust_remote_code=True).save_pretrained(again + "/model")
    AutoProcessor.from_pretrained(saved, trust_remote_code=True).save_pretrained(again + "/model")
    for folder in (again, again + "/model"):
        asr = pipeline("automatic-speech-recognition", model=folder, trust_remote_code=True)
        assert asr(audio)["text"] == expected
    """
    run(script, saved, tmp_path / "again", audio, expected)
    ours = {str(path.relative_to(saved)): path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    for folder in (tmp_path / "again" / "model", tmp_path / "again"):
        again = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        differ = {name for name in ours if again.get(name) != ours[name]}
        assert not differ, differ
