"""Check that a checkpoint works for users without this package; everything is tried in fresh processes."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from transformers import WhisperModel

from seam.modeling_seam import load_checkpoint
from seam.modeling_seam.building import remove_lora
from seam.publishing.export import export

PROBE = Path(__file__).with_name("probe.py")
COMMIT = "0" * 39 + "1"


@dataclass(frozen=True)
class Check:
    """One row of the table: what was tried, whether it worked, and what was found."""

    name: str
    passed: bool
    seen: str


def selfcheck(model: str, recording: Path) -> Iterator[Check]:
    """
    Export a full and a light folder of a checkpoint, and use both as users without this package do.

    Args:
        model: folder or Hub id.
        recording: a short one, at the model's sampling rate.

    Yields:
        Each [`Check`] as soon as it is done.
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = export(model, work / "full")
        cache = work / "hub"
        hub_id = _add_to_cache(folder, cache, "local/full")

        for name, checkpoint in (("from a folder", str(folder)), ("from a Hub cache", hub_id)):
            seen = _probe("classes", checkpoint, recording, cache)
            expected = "AutoModel" in seen and seen["AutoProcessor"] == "SeamProcessor"
            yield Check(f"auto classes {name}", expected, _listed(seen))
        seen = _probe("no_trust", str(folder), recording, cache)
        yield Check("no code without trust_remote_code", bool(seen.get("refused")), _listed(seen))
        texts = _probe("forms", str(folder), recording, cache)
        for form, text in texts.items():
            same = "path" in texts and bool(text) and text == texts["path"]
            yield Check(f"pipeline: {form}", same, text)
        full = _probe("logits", str(folder), recording, cache)
        same = len(full) == 3 and len(set(full.values())) == 1
        yield Check("save, reload, save, reload: equal logits", same, _listed(full, 12))

        backbones = _backbones(model, work / "backbones", cache)
        if isinstance(backbones, str):
            yield Check("light: equal logits", True, backbones)
            return
        used_cache = cache if backbones else None  # backbones on the Hub are in the user's own cache
        error = _export_light(model, work / "light", backbones, used_cache)
        if error:
            yield Check("light: export", False, error)
            return
        seen = _probe("logits", str(work / "light"), recording, used_cache, "--once")
        size = sum(path.stat().st_size for path in (work / "light").rglob("*") if path.is_file())
        equal = seen.get("loaded") == full.get("loaded")
        yield Check("light: equal logits", equal, f"{size / 1e6:.1f} MB; {_listed(seen, 12)}")


def _listed(seen: dict, length: int = 40) -> str:
    return seen.get("error") or ", ".join(f"{name}: {str(value)[:length]}" for name, value in seen.items())


def _hub(cache: Path | None) -> dict[str, str]:
    """Return environment variables that allow no network and name the cache: `cache`, or the user's own."""
    return {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache or constants.HF_HUB_CACHE)}


def _probe(check: str, checkpoint: str, recording: Path, cache: Path | None, *options: str) -> dict:
    """Run `probe.py` in another folder; return its findings, or the last line of its error."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as elsewhere:
        process = subprocess.run(
            [sys.executable, str(PROBE), check, checkpoint, str(recording.resolve()), *options],
            cwd=elsewhere,
            env={**inherited, **_hub(cache), "HF_MODULES_CACHE": elsewhere},
            capture_output=True,
            text=True,
        )
    lines = (process.stdout if process.returncode == 0 else process.stderr).strip().splitlines() or [""]
    return json.loads(lines[-1]) if process.returncode == 0 else {"error": lines[-1]}


def _add_to_cache(folder: Path, cache: Path, repo_id: str) -> str:
    """Put a folder where the Hub's client looks for a downloaded repository."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT).symlink_to(folder.resolve(), target_is_directory=True)
    return repo_id


def _backbones(model: str, folder: Path, cache: Path) -> dict[str, str] | str:
    """
    Return Hub ids of a checkpoint's backbones, or a sentence that says why there can be no light folder.

    There are none to return if the checkpoint's config names them. The backbones of a checkpoint that was trained from
    folders are extracted from it and put into `cache` under made-up ids.
    """
    seam, _ = load_checkpoint(model)
    if seam.config.backbones is not None:
        return {}
    if seam.config.alignment_only:
        return "not tried: the checkpoint has no LLM"
    if not seam.config.lora_rank:
        return "not tried: the checkpoint has no LoRA"
    if seam.config.token_projection == "table" and not seam.config.token_table_trained:
        return "not tried: the token table is re-written from Whisper's decoder, which the checkpoint does not hold"
    whisper = WhisperModel(seam.config.audio_config)
    whisper.encoder = seam.encoder
    whisper.save_pretrained(folder / "encoder")
    remove_lora(seam.language_model, fold_in=False)
    seam.language_model.save_pretrained(folder / "llm")
    return {role: _add_to_cache(folder / role, cache, f"local/{role}") for role in ("encoder", "llm")}


def _export_light(model: str, target: Path, backbones: dict[str, str], cache: Path | None) -> str:
    """Export in a process that uses the cache; return the last line of its error, if any."""
    options = [word for role, name in backbones.items() for word in (f"--{role}", name)]
    process = subprocess.run(
        [sys.executable, "-m", "seam", "export", model, str(target), "--light", *options],
        env={**os.environ, **_hub(cache)},
        capture_output=True,
        text=True,
    )
    return "" if process.returncode == 0 else (process.stderr.strip().splitlines() or ["failed"])[-1]
