"""Arguments of the `seam` command: what they are called, and checks that name mistakes before anything heavy begins."""

import glob
import io
import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.errors import StrictDataclassError

from seam.data.files import check_path, one_line, recipe_file


@contextmanager
def one_sentence_errors():
    """End the command with one sentence on standard error and exit status 1 when its input is bad."""
    try:
        yield
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise typer.Exit(1) from error


def printable_output() -> None:
    """
    Print what the terminal's encoding lacks as escapes, in the place of ending with an error after the work.

    Such are other scripts where it is not UTF-8, and the bytes of file names that are not UTF-8 (lone surrogates).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(row: dict[str, Any]) -> None:
    """Print a JSON object in one line, with JSON's own escapes where the terminal's encoding lacks a character."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(row)
    print(line, flush=True)


def checked(check: Callable) -> Callable:
    """Return a callback that checks an argument, so that mistakes are named before anything heavy is imported."""

    def callback(value):
        with one_sentence_errors():
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    check(one)
        return value

    return callback


def check_audio(path: Path) -> None:
    """Raise an error unless `path` is an audio file, by its header where libsndfile reads that; a pipe is read once."""
    from seam.audio_files import UNREADABLE, decode, opened

    if path.exists() and not (path.is_file() or path.is_dir()):
        return
    try:
        if path.is_file():
            with opened(path):
                return
    except UNREADABLE:
        pass  # another decoder may read it, or say why not
    decode(path, str(path))


def recordings(names: list[str]) -> list[str]:
    """
    Return the recordings that names on a command line mean, in order.

    Args:
        names: files, URLs, `-` for standard input, folders, of which all audio files are taken, and patterns that the
            shell did not expand.

    Raises:
        FileNotFoundError: for a folder or a pattern without audio, and where no file exists at all.
        ValueError: for a single file that is not audio.
    """
    from seam.audio_files import AUDIO_SUFFIXES

    found: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = [str(one) for one in sorted(path.rglob("*")) if one.suffix.lower() in AUDIO_SUFFIXES]
            if not inside:
                raise FileNotFoundError(f"{name}: the folder holds no audio file.")
            found += inside
        elif not path.exists() and glob.has_magic(name):
            matches = sorted(glob.glob(name, recursive=True))
            if not matches:
                raise FileNotFoundError(f"{name}: no file matches the pattern.")
            found += matches
        else:
            found.append(name)
    if not any(one == "-" or one.startswith(("http://", "https://")) or Path(one).exists() for one in found):
        raise FileNotFoundError(f"{found[0]}: no such audio file.")
    if len(found) == 1 and Path(found[0]).is_file():
        check_audio(Path(found[0]))
    return found


def check_recordings(names: list[str]) -> list[str]:
    """Return `recordings`, so that mistakes are named before anything heavy is imported."""
    with one_sentence_errors():
        return recordings(names)


def check_recipe(path: Path) -> None:
    """Raise an error unless `path` is a file, here or among the package's."""
    if not recipe_file(path).is_file():
        raise FileNotFoundError(f"{path}: no such recipe.")


def check_manifest(path: Path) -> None:
    """Raise an error unless `path` is a manifest or an audiofolder."""
    from seam.data.manifest import manifest_file

    manifest_file(path)


def check_checkpoint(name: str) -> None:
    """Raise an error unless `name` is a folder with a config or a repository of the Hub."""
    path = Path(name)
    if not path.exists() and path.with_name(f".{path.name}.old").is_dir():
        return  # an export was killed, which loading completes
    if Path(name).is_file():
        raise ValueError(f"cannot load the checkpoint {name!r}: it is a file; accepted: a folder or a Hub id.")
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(f"cannot load the checkpoint {name!r}: the folder has no config.json.")
        return
    from huggingface_hub import hf_hub_download

    check_path(name)
    try:
        hf_hub_download(name, "config.json")
    except (OSError, ValueError) as error:
        raise OSError(f"cannot load the checkpoint {name!r}: no such folder, and the Hub says: {error}") from error


def check_recipe_or_checkpoint(name: str) -> None:
    """Raise an error unless `name` is a recipe or a checkpoint."""
    if Path(name).suffix in (".yaml", ".yml"):
        check_recipe(Path(name))
    else:
        check_checkpoint(name)


Files = Annotated[
    list[str],
    typer.Argument(
        help="Audio of any length and sample rate: files, folders, URLs, - for standard input.",
        callback=check_recordings,
    ),
]
Model = Annotated[str, typer.Option(help="Checkpoint: a folder or a Hub id.", callback=checked(check_checkpoint))]
BatchSize = Annotated[int, typer.Option(min=1, help="Pieces of audio decoded at once.")]
Recipe = Annotated[Path, typer.Argument(help="YAML recipe.", callback=checked(check_recipe))]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, with dots between nested keys.")]

Light = Annotated[bool, typer.Option("--light", help="Only what was trained; backbones by Hub id.")]
Backbone = Annotated[str | None, typer.Option(help="Hub id, for a light folder of a checkpoint trained from folders.")]
Checkpoint = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint: a folder or a Hub id.", callback=checked(check_checkpoint))
]
Target = Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; an older checkpoint is replaced.")]
