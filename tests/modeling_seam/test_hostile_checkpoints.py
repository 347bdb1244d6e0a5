"""A checkpoint that describes what its files do not hold is refused in one sentence, quickly and without the memory."""

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from seam.modeling_seam import load_checkpoint
from seam.processing_seam import MOST_STEPS, SeamProcessor
from seam.tests.helpers.shipped import TINY

SECONDS = 20  # on a machine with other work; most take less than one


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


def change(file: Path, name: str, value) -> None:
    """Set a value in a JSON file, by a name with dots."""
    values = json.loads(file.read_text(encoding="utf-8"))
    *parents, last = name.split(".")
    part = values
    for parent in parents:
        part = part[parent]
    part[last] = value
    file.write_text(json.dumps(values), encoding="utf-8")


def refused(folder: Path, message: str) -> None:
    start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_checkpoint(str(folder))
    assert time.monotonic() - start < SECONDS and len(str(caught.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2 * 1024**2  # KiB


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("audio_config.encoder_layers", 10**9, "audio_config.encoder_layers is 1000000000; accepted: up to"),
        ("text_config.num_hidden_layers", 10**30, "text_config.num_hidden_layers is 10+; accepted: up to"),
        (
            "audio_config.encoder_layers",
            900,
            "audio_config.encoder_layers is 900, but the weight files hold [0-9]+ of its",
        ),
        ("aligner_config.decoder_layers", 900, "aligner_config.decoder_layers is 900, but the weight files hold"),
        ("audio_config.encoder_ffn_dim", 10**9, "does not fit its config: 1 mismatched keys .encoder.* by config.json"),
        ("text_config.intermediate_size", 10**9, "does not fit its config: 1 mismatched keys .language_model"),
        ("text_config.vocab_size", 10**9, "does not fit its config: 1 mismatched keys"),
        ("lora_rank", 10**9, "does not fit its config: 1 mismatched keys .*lora"),
        ("text_config.intermediate_size", -1, "config.json describes no model that can be built"),
        ("dtype", "float17", "config.json describes no model that can be built"),
    ],
)
def test_sizes_that_the_weight_file_does_not_hold(copy, name, value, message):
    change(copy / "config.json", name, value)
    refused(copy, message)


def test_a_light_checkpoint_is_compared_with_its_own_file(build_light):
    folder, processor = build_light
    change(folder / "config.json", "aligner_config.decoder_ffn_dim", 10**9)
    refused(folder, "does not fit its config: 1 mismatched keys .bridge")


@pytest.fixture
def build_light(build_model, backbones, processor, tmp_path):
    model = build_model()
    model.config.backbones = {role: {"id": "a/b"} for role in ("encoder", "llm")}
    model.save_pretrained(tmp_path / "light", light=True)
    processor.save_pretrained(tmp_path / "light")
    return tmp_path / "light", processor


@pytest.mark.parametrize(
    ("keep", "message"), [(0.05, "hold 0 of its tensors"), (0.5, "hold [0-9]+ of its tensors|missing keys")]
)
def test_a_weight_file_with_few_of_the_tensors(copy, keep, message):
    weights = load_file(copy / "model.safetensors")
    few = dict(sorted(weights.items())[: int(keep * len(weights))])
    save_file(few, copy / "model.safetensors", metadata={"format": "pt"})
    refused(copy, message)


@pytest.mark.parametrize(
    ("file", "name", "value", "message"),
    [
        (
            "processor_config.json",
            "feature_extractor.feature_size",
            10**9,
            "feature_size is 10+; accepted: above 0, up",
        ),
        ("processor_config.json", "feature_extractor.n_fft", 10**12, "n_fft is 10+; accepted: above 0, up to"),
        ("processor_config.json", "feature_extractor.hop_length", 0, "hop_length is 0; accepted: above 0, up to"),
        ("processor_config.json", "feature_extractor.chunk_length", "30", "chunk_length is 30; accepted: above 0"),
        ("processor_config.json", "feature_extractor.feature_extractor_type", 3, "describes no processor"),
        ("processor_config.json", "instruction", None, "instruction is None; accepted: a string"),
        ("processor_config.json", "boa_token", [1], "describes no processor"),
        ("tokenizer_config.json", "model_max_length", "x", "model_max_length is 'x'; accepted: a number"),
        ("generation_config.json", "pad_token_id", "x", "generation_config.json is damaged: a setting is of another"),
        ("generation_config.json", "max_new_tokens", [1], "generation_config.json is damaged: a setting is of another"),
    ],
)
def test_settings_of_other_sizes_or_types(copy, file, name, value, message):
    change(copy / file, name, value)
    refused(copy, message)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            f"up to {MOST_STEPS:,} steps",
        ),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "does not end"),
        ("{{ lipsum(100000) }}", "does not end"),
        ("{{ 10 ** 10 ** 9 }}", "no powers of numbers"),
        ("{{ 'a' * 99999999999 }}", "does not end"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "does not end"),
        (
            "{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
            "not end",
        ),
        ("{{ x.y.z }}", "chat_template.jinja cannot be rendered: 'x' is undefined"),
        ("{% if %}", "chat_template.jinja cannot be rendered: Expected an expression"),
    ],
)
def test_chat_templates_that_do_not_end_or_are_none(copy, template, message):
    (copy / "chat_template.jinja").write_text(template)
    refused(copy, message)


def test_a_template_with_asterisks_in_its_text_is_not_taken_for_arithmetic(copy):
    processor = SeamProcessor.from_pretrained(copy)
    before = processor.prompt_ids()
    processor.chat_template = "{# 2 ** 3 #}{% set b = '**bold**' %}" + processor.chat_template
    assert processor.prompt_ids() == before == processor.prompt_ids()


@pytest.mark.medium
@pytest.mark.parametrize("what", ["from seam.processing_seam import SeamProcessor", "from seam.modeling_seam import *"])
def test_nothing_is_asked_on_the_terminal(what):
    load = f"{what}\nSeamProcessor.from_pretrained({str(TINY)!r})"
    done = subprocess.run([sys.executable, "-c", load], input="", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "custom code" not in done.stdout + done.stderr and "model of type" not in done.stderr
