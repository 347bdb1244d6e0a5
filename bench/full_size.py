"""
Measure time and peak memory of the paper's architecture with random weights.

    python -m bench.full_size [--size paper|tiny] [--folder FOLDER] [--json FILE]

Backbones are written in folders laid out like the published ones; from these the model is assembled, trained for one
step of each stage, saved in shards, loaded, and given one recording to transcribe. Every part runs in a process of its
own, so that each has its own peak. Paper size needs 24 GB of memory, and as much disk, in FOLDER or where temporary
files lie.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, Qwen3Config, TrainingArguments, WhisperConfig, WhisperFeatureExtractor

from seam.bench.common import synchronize
from seam.data.dataset import ListDataset, SpeechCollator, SpeechDataset
from seam.data.manifest import Utterance, read_manifest
from seam.experiments import tiny_backbones
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.train.alignment import AlignmentTrainer
from seam.train.describe import backbone_config
from seam.train.instruction import InstructionTrainer
from seam.train.recipe import DataSettings
from seam.train.refinement import AlignedDataset, RefinementTrainer
from seam.train.trainer import StageTrainer

TINY = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
NEW_TOKENS = 20  # random weights never end a transcript
BATCHES = (1, 8, 32) if torch.cuda.is_available() else (1,)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ---- folders laid out like the published checkpoints ----

# Names and shapes of weights, written out by hand instead of taken from a model: a test of loading must not depend on
# the classes that load.

Named = Iterator[tuple[str, tuple[int, ...]]]


def whisper_tensors(config: WhisperConfig) -> Named:
    """
    Yield name and shape of each weight of `openai/whisper-*`.

    Names begin with `model.`; keys have no bias; the output layer is the decoder's embedding table and is not stored.
    """
    d = config.d_model
    yield "model.encoder.conv1.weight", (d, config.num_mel_bins, 3)
    yield "model.encoder.conv1.bias", (d,)
    yield "model.encoder.conv2.weight", (d, d, 3)
    yield "model.encoder.conv2.bias", (d,)
    yield "model.encoder.embed_positions.weight", (config.max_source_positions, d)
    yield "model.decoder.embed_tokens.weight", (config.vocab_size, d)
    yield "model.decoder.embed_positions.weight", (config.max_target_positions, d)
    sides = (
        ("encoder", config.encoder_layers, config.encoder_ffn_dim, ("self_attn",)),
        ("decoder", config.decoder_layers, config.decoder_ffn_dim, ("self_attn", "encoder_attn")),
    )
    for side, layers, width, attentions in sides:
        yield f"model.{side}.layer_norm.weight", (d,)
        yield f"model.{side}.layer_norm.bias", (d,)
        for index in range(layers):
            layer = f"model.{side}.layers.{index}"
            for attention in attentions:
                for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    yield f"{layer}.{attention}.{projection}.weight", (d, d)
                    if projection != "k_proj":
                        yield f"{layer}.{attention}.{projection}.bias", (d,)
            for norm in (*(f"{one}_layer_norm" for one in attentions), "final_layer_norm"):
                yield f"{layer}.{norm}.weight", (d,)
                yield f"{layer}.{norm}.bias", (d,)
            yield f"{layer}.fc1.weight", (width, d)
            yield f"{layer}.fc1.bias", (width,)
            yield f"{layer}.fc2.weight", (d, width)
            yield f"{layer}.fc2.bias", (d,)


def qwen3_tensors(config: PreTrainedConfig, lm_head: bool) -> Named:
    """
    Yield name and shape of each weight of `Qwen/Qwen3-*`.

    Args:
        config: with the sizes.
        lm_head: whether the output layer is stored: not by Qwen3-4B, which ties it to the embedding table; by
            Qwen3-0.6B, although it is tied; by Qwen3-8B, which does not tie it.
    """
    d, head, width = config.hidden_size, config.head_dim, config.intermediate_size
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    if lm_head:
        yield "lm_head.weight", (config.vocab_size, d)
    yield "model.embed_tokens.weight", (config.vocab_size, d)
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (d,)
        yield f"{layer}.mlp.down_proj.weight", (d, width)
        yield f"{layer}.mlp.gate_proj.weight", (width, d)
        yield f"{layer}.mlp.up_proj.weight", (width, d)
        yield f"{layer}.post_attention_layernorm.weight", (d,)
        yield f"{layer}.self_attn.k_norm.weight", (head,)
        yield f"{layer}.self_attn.k_proj.weight", (keys, d)
        yield f"{layer}.self_attn.o_proj.weight", (d, queries)
        yield f"{layer}.self_attn.q_norm.weight", (head,)
        yield f"{layer}.self_attn.q_proj.weight", (queries, d)
        yield f"{layer}.self_attn.v_proj.weight", (keys, d)
    yield "model.norm.weight", (d,)


def write_published(folder: Path, config: PreTrainedConfig, named: Named, shards: int, dtype: torch.dtype) -> Path:
    """
    Write config.json and random weights, one shard in memory at a time.

    Args:
        folder: to be written.
        config: of the model.
        named: names and shapes of the weights; a tied output layer among them gets the values of the embedding table.
        shards: number of files, of about equal size; with more than one, an index is written, too.
        dtype: of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    named = list(named)
    sizes = [torch.Size(shape).numel() for _, shape in named]
    groups, filled = [[] for _ in range(shards)], 0
    for (name, shape), size in zip(named, sizes, strict=True):
        groups[min(filled * shards // sum(sizes), shards - 1)].append((name, shape))
        filled += size
    weight_map, kept = {}, {}
    for number, group in enumerate(tqdm(groups, desc=folder.name, leave=False), start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        tensors = {}
        for name, shape in group:
            value = torch.empty(shape, dtype=dtype)
            tensors[name] = value.fill_(1) if "norm.weight" in name else value.normal_(std=0.02)
            if config.tie_word_embeddings and name in ("lm_head.weight", "model.embed_tokens.weight"):
                tensors[name] = kept.setdefault("table", tensors[name]).clone()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if shards > 1:
        index = {"metadata": {"total_size": sum(sizes) * dtype.itemsize}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def configs(size: str) -> tuple[WhisperConfig, PreTrainedConfig]:
    """Return the configurations of encoder and LLM at a size, `paper` or `tiny`."""
    if size == "paper":
        return backbone_config("openai/whisper-large-v2"), backbone_config("Qwen/Qwen3-4B-Instruct-2507")
    llm = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 500, "head_dim": 16}
    specials = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
    return (
        WhisperConfig(**TINY, vocab_size=400, **specials),
        Qwen3Config(**llm, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    )


# ---- the parts, in the order in which they run; each returns the figures that only it has ----


def backbones(folder: Path, size: str) -> dict:
    """Write both backbones, in one file and in three shards; the tokenizer has the first 340 ids of the vocabulary."""
    whisper, llm = configs(size)
    write_published(folder / "whisper", whisper, whisper_tensors(whisper), 1, torch.bfloat16)
    WhisperFeatureExtractor(feature_size=whisper.num_mel_bins).save_pretrained(folder / "whisper")
    write_published(folder / "llm", llm, qwen3_tensors(llm, lm_head=False), 3, torch.bfloat16)
    texts = [one.text for one in recordings()]
    tiny_backbones.make_tokenizer(texts * 20, 340).save_pretrained(folder / "llm")
    return {"tensors": len(list(whisper_tensors(whisper))) + len(list(qwen3_tensors(llm, lm_head=False)))}


def stage_1(folder: Path, size: str) -> dict:
    """Train Stage 1 for one step in fp32, with the embedding table alone of the LLM."""
    model, processor = assemble(folder, torch.float32, alignment_only=True)
    with measured() as step:
        train(AlignmentTrainer, model, processor, folder, speech(processor))
    return {"step_seconds": step["seconds"], "bound_gb": stage_1_bound(model) / 1e9}


def stage_1_bound(model: SeamForSpeechRecognition) -> int:
    """Return the bytes in fp32 of encoder, embedding table, and aligner with gradients and AdamW's moments."""
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    return 4 * (count["encoder"] + 4 * count["bridge"] + count["language_model"])


def save(folder: Path, size: str) -> dict:
    """Save the complete model in bf16, in shards of 5 GB."""
    model, processor = assemble(folder, torch.bfloat16)
    with measured() as saving:
        model.save_pretrained(folder / "model", max_shard_size="5GB")
        processor.save_pretrained(folder / "model")
    size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    return {"save_seconds": saving["seconds"], "weights_gb": size / 1e9}


def load(folder: Path, size: str) -> dict:
    """Load the model, with every check that `from_pretrained` makes, and do nothing else."""
    model, _ = reload(folder)
    return {"weights_gb": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9}


def stage_2(folder: Path, size: str) -> dict:
    """Train Stage 2 for one step in bf16."""
    model, processor = reload(folder)
    with measured() as step:
        train(InstructionTrainer, model, processor, folder, speech(processor))
    return {"step_seconds": step["seconds"]}


def stage_3(folder: Path, size: str) -> dict:
    """Train Stage 3 for one step in bf16 on labels in place of Stage-1 tokens: random weights never predict EOA."""
    model, processor = reload(folder)
    items = [(index, item["token_ids"], item["token_ids"]) for index, item in enumerate(speech(processor))]
    with measured() as step:
        train(RefinementTrainer, model, processor, folder, AlignedDataset(None, items))
    return {"step_seconds": step["seconds"]}


def transcribe(folder: Path, size: str) -> dict:
    """Decode `NEW_TOKENS` tokens per batch size, with Stage 1 alone and with the LLM after it."""
    model, processor = reload(folder)
    model = model.to(DEVICE)
    model.config.aligner_config.max_target_positions = NEW_TOKENS + 1  # where Stage 1 stops without EOA
    figures = {}
    for batch in BATCHES:
        inputs = processor(audio=[recordings()[0].audio] * batch).to(DEVICE, torch.bfloat16)
        model.generate(**inputs, max_new_tokens=2)  # warm-up
        with measured() as stage_1_time:
            stage_1_ids = model.generate(**inputs, use_llm=False)
        with measured() as full_time:
            full_ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
        figures |= {
            f"batch_{batch}_stage_1_seconds": stage_1_time["seconds"],
            f"batch_{batch}_stage_1_tokens": stage_1_ids.shape[1],
            f"batch_{batch}_full_seconds": full_time["seconds"],
            f"batch_{batch}_full_tokens": full_ids.shape[1],
        }
    return figures


PARTS: dict[str, Callable[[Path, str], dict]] = {
    part.__name__: part for part in (backbones, stage_1, save, load, stage_2, stage_3, transcribe)
}


# ---- used by several parts ----


def recordings() -> list[Utterance]:
    """Return the shipped recordings."""
    return read_manifest(Path(__file__).parents[1] / "checkpoints" / "recordings" / "manifest.jsonl")


def speech(processor: SeamProcessor) -> ListDataset:
    """Return a data set of one shipped recording."""
    dataset = SpeechDataset(recordings()[:1], processor)
    return ListDataset([dataset[0]])


def assemble(folder: Path, dtype: torch.dtype, **config) -> tuple[SeamForSpeechRecognition, SeamProcessor]:
    """Build model and processor around the backbones in `folder`."""
    names = str(folder / "whisper"), str(folder / "llm")
    processor = SeamProcessor.from_backbones(*names)
    return SeamForSpeechRecognition.from_backbones(*names, processor, dtype=dtype, **config), processor


def reload(folder: Path) -> tuple[SeamForSpeechRecognition, SeamProcessor]:
    """Load the saved model in bf16, with its processor."""
    model = SeamForSpeechRecognition.from_pretrained(folder / "model", dtype=torch.bfloat16)
    return model, SeamProcessor.from_pretrained(folder / "model")


def train(trainer: type[StageTrainer], model, processor, folder: Path, dataset: Dataset):
    """Take one optimizer step on one utterance."""
    arguments = TrainingArguments(
        output_dir=str(folder / "training"),
        max_steps=1,
        per_device_train_batch_size=1,
        learning_rate=5e-4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer(
        model=model,
        args=arguments,
        data_collator=SpeechCollator(processor),
        train_dataset=dataset,
        processor=processor,
        validation=[],
        data=DataSettings(),
    ).train()


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Put the wall-clock seconds of a block into the yielded dictionary, once all work on the device is done."""
    result, device = {}, torch.device(DEVICE)
    synchronize(device)
    start = time.perf_counter()
    yield result
    synchronize(device)
    result["seconds"] = time.perf_counter() - start


class PeakMemory(threading.Thread):
    """Watch the peaks of this process in bytes: `own` memory, `mapped` files, and `resident`, both together."""

    def __init__(self):
        super().__init__(daemon=True)
        self.own = self.mapped = self.resident = 0

    def run(self):
        """Follow the memory of this process until it ends."""
        while True:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.own = max(self.own, int(status["RssAnon"].split()[0]) * 1024)
            self.mapped = max(self.mapped, int(status["RssFile"].split()[0]) * 1024)
            self.resident = int(status["VmHWM"].split()[0]) * 1024  # the kernel keeps this peak itself
            time.sleep(0.02)


def run_part(name: str, folder: Path, size: str) -> dict:
    """Run a part in this process and return its seconds, its peak memory and the figures that it returned."""
    memory = PeakMemory()
    memory.start()
    with measured() as total:
        figures = PARTS[name](folder, size)
    peaks = {
        "peak_gb": memory.own / 1e9,
        "peak_mapped_gb": memory.mapped / 1e9,
        "peak_resident_gb": memory.resident / 1e9,
    }
    if DEVICE == "cuda":
        peaks["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return {"seconds": total["seconds"], **peaks, **figures}


def print_table(rows: list[dict], console: Console) -> None:
    """Print seconds and peaks of every part, and the figures that only it has."""
    columns = {
        "seconds": "seconds",
        "peak_gb": "peak, GB",
        "peak_mapped_gb": "mapped files, GB",
        "peak_resident_gb": "both at once, GB",
    }
    table = Table("part", *columns.values(), "")
    for row in rows:
        others = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if key not in ("part", *columns))
        table.add_row(row["part"], *(f"{row[key]:.1f}" for key in columns), others)
    console.print(table)


def main(
    size: str = "paper",
    folder: Path | None = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    part: Annotated[str | None, typer.Option(hidden=True)] = None,
):
    """Measure every step of the architecture once, each in a process of its own."""
    if size not in ("paper", "tiny"):
        raise typer.BadParameter(f"--size is {size!r}; accepted: paper, tiny.")
    if part is not None:
        print(json.dumps(run_part(part, folder, size)))
        return
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    rows, console = [], Console(width=None if sys.stdout.isatty() else 150)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for name in PARTS:
            console.print(f"{name} …")
            command = [sys.executable, "-m", "seam.bench.full_size", "--size", size, "--folder", work, "--part", name]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"part": name, **json.loads(process.stdout.splitlines()[-1])})
    print_table(rows, console)
    if json_file is not None:
        json_file.write_text(json.dumps({"size": size, "device": DEVICE, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
