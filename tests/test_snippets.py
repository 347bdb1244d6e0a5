"""What the documents say holds: their Python runs, their commands parse, and what they link to and name exists."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from transformers import TrainingArguments

from seam.__main__ import app
from seam.experiments.compare import CompareRecipe
from seam.experiments.demo import DemoRecipe
from seam.modeling_seam import SeamConfig
from seam.tests.helpers import forked
from seam.train.recipe import DataSettings, StageRecipe, load_recipe

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "train_stage1.ipynb"
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "bench" / "RESULTS.md"]
SECTIONS = {"data": DataSettings, "training": TrainingArguments, "config": SeamConfig}
# Not parsed here; what `transformers serve` answers is tested in test_serving.py.
NOT_OURS = ("curl", "transformers")


def named(path: Path) -> str:
    """Return how a test names a document: its path in the repository."""
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    """Return the Markdown of a document, or of a notebook's cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def blocks(path: Path, *languages: str) -> list[str]:
    """Return the fenced blocks of a document that are marked with one of `languages` and nothing else."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", text_of(path), re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in languages]


def inline(path: Path) -> list[str]:
    """Return the inline code of a document."""
    prose = re.sub(r"^```.*?^```$", "", text_of(path), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", prose)


def run_python(code: str, folder: Path) -> str:
    """Run code beside `checkpoints` and `recording.wav`, offline, in a process of its own; return the output."""
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    shutil.copyfile(ROOT / "checkpoints" / "recordings" / "audio" / "000000.wav", folder / "recording.wav")
    environment = {**os.environ, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    environment.pop("HF_MODULES_CACHE", None)
    done = forked.run([sys.executable, "-c", code], cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_namespaces(sources: dict[str, str]) -> str:
    """Return code that runs each source in a namespace of its own, under its name in tracebacks."""
    return f"for name, source in {sources!r}.items():\n    exec(compile(source, name, 'exec'), {{'__name__': name}})\n"


@pytest.mark.medium
def test_python_of_all_documents(tmp_path):
    sources = {named(path): "\n".join(blocks(path, "python")) for path in DOCUMENTS}
    assert sources["README.md"] and sources["docs/evaluation.md"] and sources["docs/transcribing.md"]
    output = run_python(in_namespaces({name: source for name, source in sources.items() if source}), tmp_path)
    assert output.count("set the light to ten degrees") == 4  # the pipeline, the model, Stage 1; the prompted model


@pytest.mark.medium
def test_card_without_the_package(tmp_path):
    card = ROOT / "checkpoints" / "tiny" / "README.md"
    if not (card.parent / "configuration_seam.py").exists():
        pytest.skip("the checkpoint carries no code")
    hidden = "import sys\nsys.modules['seam'] = None  # any import of the package fails\n"
    output = run_python(hidden + "\n".join(blocks(card, "python")), tmp_path)
    assert output.count("set the light to ten degrees") == 3  # the pipeline, the model, Stage 1


@pytest.mark.slow
def test_notebook_trains_and_recognises_other_voices(tmp_path):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    measure = """
rates = [word_errors(references, texts).error_rate for texts in (before, after)]
print(json.dumps([*rates, *losses.values()]))
"""
    output = run_python(in_namespaces({named(NOTEBOOK): code + measure}), tmp_path)
    before, after, *losses = json.loads(output.splitlines()[-1])
    assert before > 90 and after < 35  # 169 and 9.8 in the notebook
    assert losses[-1] < losses[0] / 3


def test_notebook_is_saved_as_it_ran():
    assert NOTEBOOK.stat().st_size < 300_000
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {"error"}.isdisjoint(output["output_type"] for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    printed = ["".join(output["text"]) for output in outputs if output["output_type"] == "stream"]
    assert not re.search(r"(?<![\w.])/\w+/", "".join(printed))  # a path of the machine
    assert all(output.get("name") != "stderr" for output in outputs)


def shell_lines(path: Path) -> Iterator[list[str]]:
    """Yield the words of each command in the document's blocks for a shell: those without a language, and `bash`."""
    for block in blocks(path, "", "bash"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def parse(words: list[str]) -> None:
    """Parse the arguments of `seam` as the command does, without running it."""
    command, context = typer.main.get_command(app), None
    name = "seam"
    while hasattr(command, "commands"):
        context = command.make_context(name, [*words], parent=context)
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
    for parameter in command.params:
        parameter.callback = None  # the files that a document speaks of need not exist
    command.make_context(name, [*words], parent=context)
    if name in STAGES and Path(ROOT, words[0]).is_file():
        load_recipe(StageRecipe, ROOT / words[0], [*words[1:], "training.use_cpu=true"])  # bf16 needs to be told
    elif name in ("compare", "demo") and words and words[0].endswith(".yaml"):
        load_recipe({"compare": CompareRecipe, "demo": DemoRecipe}[name], ROOT / words[0], words[1:])


STAGES = ("alignment", "instruction", "refinement", "draft", "decode")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def check_make(words: list[str]) -> None:
    """Check that the Makefile has the targets and reads the variables."""
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"\$\({name}\)" if is_variable else rf"^{re.escape(name)}:"
        assert re.search(pattern, MAKEFILE, re.MULTILINE), f"the Makefile has no {name}"


def check(words: list[str]) -> None:
    """Check one command of a document."""
    program, arguments = words[0], words[1:]
    if program == "seam":
        parse(arguments)
    elif program == "make":
        check_make(arguments)
    elif program in ("torchrun", "accelerate"):
        if "--config_file" in arguments:
            assert Path(ROOT, arguments[arguments.index("--config_file") + 1]).is_file()
        assert arguments[arguments.index("-m") + 1] == "seam"
        parse(arguments[arguments.index("-m") + 2 :])
    elif program == "pip":
        extras = re.findall(r"\[(\w+)\]", " ".join(arguments))
        assert all(f"\n{extra} =\n" in (ROOT / "setup.cfg").read_text(encoding="utf-8") for extra in extras)
    else:
        assert program in NOT_OURS, f"neither a command nor marked as something else: {' '.join(words)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_parse(document):
    for words in shell_lines(document):
        try:
            check(words)
        except Exception as error:
            raise AssertionError(f"{named(document)}: {' '.join(words)}: {error}") from error
    tree = typer.main.get_command(app)
    for code in inline(document):
        words = code.split()
        if words[0] == "seam" and len(words) > 1:
            command = tree
            for word in words[1:3]:
                command = command.commands[word] if hasattr(command, "commands") else command
        elif words[0] == "make":
            check_make(words[1:])


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_settings_exist(document):
    known = {f"{section}.{one.name}" for section, cls in SECTIONS.items() for one in fields(cls)}
    for code in inline(document):
        for name in re.findall(rf"(?<![\w/.])(?:{'|'.join(SECTIONS)})\.(?!json)\w+", code):
            assert name in known, name


def slug(heading: str) -> str:
    """Return the anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", [*LINKED, NOTEBOOK], ids=named)
def test_links_resolve(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("document", [*LINKED, NOTEBOOK], ids=named)
def test_named_files_and_what_is_in_them_exist(document):
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for code in inline(document):
        is_path = code.endswith(".py") or ("/" in code and code.split("/")[0] in folders)
        if is_path and re.fullmatch(r"[\w./*-]+", code) and not re.search(r"\b[A-Z]+\b(?!\.md)", code):
            assert any(ROOT.glob(code.rstrip("/"))), code
    text = " ".join(text_of(document).split())
    names, file = r"((?:`\w+`(?:,| and| or)? ?)+)", r"`([\w/]+\.py)`"
    found = [pair[::-1] for pair in re.findall(rf"{names}(?:in |\(){file}", text)]
    found += re.findall(rf"{file} \({names}\)", text)
    for path, together in found:
        for name in re.findall(r"`(\w+)`", together):
            assert re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")), f"{name} in {path}"
