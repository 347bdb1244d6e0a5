"""Turn a corpus into a manifest: check every utterance, and list what is left out with the reason."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from tqdm.auto import tqdm

from seam.data import checks
from seam.data.checks import CheckResult, Problem, Recording, check_recording
from seam.data.corpora.utterances import NOT_SCORED, OUTSIDE, CorpusUtterance, Exclusion, outside
from seam.data.files import locked, replacing
from seam.data.manifest import CASINGS, Utterance, write_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Utterances that may wait for each worker, so that a slow file does not hold up the others.
QUEUED_PER_WORKER = 32
# Names of files have at most 255 bytes, of which a suffix and that of a temporary file are some.
MAX_NAME = 180
# Audio is written here, and moved to AUDIO when the manifest is decided: what a run before wrote stays until then.
AUDIO, STAGED = "audio", "audio.tmp"
# By the first bytes of a file; where they are unknown, the name that the corpus gives to the bytes decides.
SUFFIXES = {b"fLaC": ".flac", b"RIFF": ".wav", b"OggS": ".ogg", b"NIST": ".sph", b"ID3": ".mp3"}
SUFFIXES |= {
    bytes([0xFF, kind]): ".mp3" for kind in (0xFA, 0xFB, 0xF2, 0xF3, 0xE2, 0xE3)
}  # layer III of MPEG 1, 2, 2.5


@dataclass
class Summary:
    """
    What `prepare` kept and what it left out.

    Args:
        manifest, left_out_file: the files.
        kept: number of utterances in the manifest, with `seconds` of audio.
        speakers: corpus and name of each that is known.
        left_out: number of utterances that were left out, by reason.
        not_scored: number of segments that the corpus itself excludes from scoring.
        tokens: of all kept transcripts, by casing; empty without a tokenizer.
    """

    manifest: Path
    left_out_file: Path
    kept: int = 0
    seconds: float = 0.0
    speakers: set[tuple[str, str]] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)
    not_scored: int = 0
    tokens: Counter[str] = field(default_factory=Counter)

    def add(self, utterance: Utterance, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Count an utterance of the manifest."""
        self.kept += 1
        self.seconds += utterance.duration
        if utterance.speaker:
            self.speakers.add((utterance.corpus, utterance.speaker))
        if tokenizer is not None:
            from seam.processing_seam import transcript_ids

            for name, casing in CASINGS.items():
                self.tokens[name] += len(transcript_ids(tokenizer, casing(utterance.text)))


@dataclass(frozen=True)
class Candidate:
    """An utterance that passed the checks without audio, and its recording, which is still to be checked."""

    utterance: CorpusUtterance
    recording: Recording


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a language model or of a checkpoint (folder or Hub id), or raise `ValueError`."""
    from transformers import AutoTokenizer

    import seam.configuration_seam  # noqa: F401 - a checkpoint's tokenizer then loads without trust_remote_code

    try:
        return AutoTokenizer.from_pretrained(name)
    except (ValueError, OSError) as error:
        raise ValueError(f"no tokenizer can be loaded from {name!r}: {error}") from error


def prepare(
    corpus: Iterable[CorpusUtterance | Exclusion],
    out: str | Path,
    *,
    max_seconds: float = 30.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    workers: int = 2,
    progress: bool = False,
    root: Path | None = None,
) -> Summary:
    """
    Check every utterance of a corpus and write the manifest.

    `manifest.jsonl` lists what is kept, `left_out.jsonl` the rest with `name`, `reason` and `detail`. Audio that is no
    file of its own in the corpus is written below `audio/`. The files are the same for any number of workers. Of
    several utterances with the same id or the same samples, the first is kept.

    Args:
        corpus: what a reader of `seam.data.corpora` yields.
        out: folder to write; a manifest in it is replaced.
        max_seconds: longest utterance.
        tokenizer: of the language model; without it, whether it preserves the transcripts is not checked.
        workers: processes that decode.
        root: folder that all audio is in; recordings elsewhere, which a corpus from somebody else may name, are left
            out. `None` reads them wherever they are.

    Raises:
        ValueError: nothing is left; an older manifest and its audio stay as they were.
        OSError: another process writes to the folder.
    """
    out = Path(out).resolve()
    summary = Summary(out / "manifest.jsonl", out / "left_out.jsonl")
    utterances = iter(tqdm(corpus, desc="checking", unit=" utterances", disable=not progress))
    # A reader raises for a folder that is not its corpus at its first utterance: before anything is written.
    utterances = itertools.chain(list(itertools.islice(utterances, 1)), utterances)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", str(out), "wait for it, or give another folder"):
        before = _audio_of(summary.manifest)
        shutil.rmtree(out / STAGED, ignore_errors=True)  # of a run that was killed
        try:
            candidates = _select_candidates(utterances, out, max_seconds, tokenizer, root)
            write_manifest(summary.manifest, _select_kept(_check_audio(candidates, workers), summary, tokenizer))
        finally:
            shutil.rmtree(out / STAGED, ignore_errors=True)
        for path in before - _audio_of(summary.manifest):
            path.unlink(missing_ok=True)
    return summary


def _audio_of(manifest: Path) -> set[Path]:
    """Return the files below AUDIO that a manifest of ours names."""
    audio = set()
    if manifest.is_file():
        for line in manifest.read_bytes().splitlines():
            try:
                audio.add(Path(os.path.normpath(manifest.parent / json.loads(line)["audio"])))
            except (ValueError, KeyError, TypeError):  # a manifest that is not as we wrote it: its audio is not ours
                return set()
    return {path for path in audio if path.is_relative_to(manifest.parent / AUDIO)}


# ---- checks of what the corpus states ----


def _select_candidates(
    utterances: Iterable[CorpusUtterance | Exclusion],
    out: Path,
    max_seconds: float,
    tokenizer: PreTrainedTokenizerBase | None,
    root: Path | None,
) -> Iterator[Candidate | Exclusion]:
    ids: set[str] = set()
    for one in utterances:
        if isinstance(one, Exclusion):
            yield one
        elif one.contents is None and root is not None and outside(one.audio, root):
            yield Exclusion(one.id, OUTSIDE, f"{one.audio} is not in {root}; --allow-remote reads it")
        elif problem := _find_problem(one, ids, tokenizer):
            yield Exclusion(one.id, *problem)
        else:
            ids.add(one.id)
            yield Candidate(one, _recording(one, out, max_seconds))


def _find_problem(one: CorpusUtterance, ids: set[str], tokenizer: PreTrainedTokenizerBase | None) -> Problem | None:
    for value in (one.text, one.id, one.speaker, one.corpus, one.split, str(one.audio)):
        if problem := checks.check_unicode(value):
            return problem
    if problem := checks.check_not_empty(one.text):
        return problem
    if one.id in ids:
        return Problem("duplicate id", f"{one.audio} with text {one.text!r} is not the first of this id")
    if tokenizer is not None:
        from seam.processing_seam import transcript_ids

        text = one.text.strip()
        (decoded,) = tokenizer.batch_decode([transcript_ids(tokenizer, text)], skip_special_tokens=True)
        return checks.check_tokenizer(text, decoded)
    return None


def _recording(one: CorpusUtterance, out: Path, max_seconds: float) -> Recording:
    """Return the recording to decode, after writing it to a file where the corpus has none."""
    path, cut_to = one.audio, None
    folder = out.joinpath(STAGED, *(_file_name(name) for name in (one.split, one.speaker) if name))
    if one.contents is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (_file_name(one.id) + _suffix(one.contents, one.audio))
        with replacing(path) as temporary:
            temporary.write_bytes(one.contents)
    elif one.segment is not None:
        cut_to = folder / f"{_file_name(one.id)}.flac"
    return Recording(path, one.text.strip(), one.segment, cut_to, one.sampling_rate, max_seconds)


def _file_name(name: str) -> str:
    """Return a file name for any name; different names get different file names."""
    quoted = quote(name, safe=" ")
    if len(quoted) > MAX_NAME:  # one character of Chinese takes nine
        digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        quoted = f"{quoted[: MAX_NAME - len(digest) - 1]}-{digest}"
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted


def _suffix(contents: bytes, audio: Path) -> str:
    return next((suffix for start, suffix in SUFFIXES.items() if contents.startswith(start)), audio.suffix)


# ---- checks of the audio ----


def _check_audio(
    candidates: Iterable[Candidate | Exclusion], workers: int
) -> Iterator[tuple[Candidate, CheckResult] | Exclusion]:
    """
    Decode the candidates in worker processes and yield them with the results, in their order.

    A recording with which a worker dies costs only itself.
    """
    candidates = iter(candidates)
    while True:
        waiting: deque[tuple[Candidate, Future[CheckResult]] | Exclusion] = deque()
        try:
            with _pool(workers) as pool:
                for one in candidates:
                    if isinstance(one, Exclusion):
                        waiting.append(one)
                    else:
                        waiting.append((one, pool.submit(check_recording, one.recording)))
                    if len(waiting) > QUEUED_PER_WORKER * workers:
                        yield _result(waiting[0])
                        waiting.popleft()
                while waiting:
                    yield _result(waiting[0])
                    waiting.popleft()
            return
        except BrokenProcessPool:
            for left in waiting:
                yield left if isinstance(left, Exclusion) else (left[0], _check_alone(left[0].recording))


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """End this worker when the process that started it is killed, for it waits on a pipe that itself keeps open."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _check_alone(recording: Recording) -> CheckResult:
    """Check a recording in a process of its own."""
    try:
        with _pool(1) as pool:
            return pool.submit(check_recording, recording).result()
    except BrokenProcessPool:
        return CheckResult(Problem("cannot be decoded", f"{recording.path}: the process that decoded it died"))
    except (ValueError, MemoryError) as error:
        return CheckResult(Problem("cannot be decoded", f"{recording.path}: {error}"))


def _result(one: tuple[Candidate, Future[CheckResult]] | Exclusion) -> tuple[Candidate, CheckResult] | Exclusion:
    if isinstance(one, Exclusion):
        return one
    candidate, future = one
    try:
        return candidate, future.result()
    except (ValueError, MemoryError) as error:
        return candidate, CheckResult(Problem("cannot be decoded", f"{candidate.recording.path}: {error}"))


def _select_kept(
    checked: Iterable[tuple[Candidate, CheckResult] | Exclusion],
    summary: Summary,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[Utterance]:
    """Yield the utterances of the manifest, write the others to `summary.left_out_file`, and count both."""
    ids: dict[bytes, str] = {}  # by the digest of the samples
    staged: list[tuple[Path, Path]] = []
    # Readers keep bytes that are not UTF-8 as surrogates, which a JSON string has as \udc80 to \udcff.
    with (
        replacing(summary.left_out_file) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace") as left_out_file,
    ):
        for one in checked:
            if not isinstance(one, Exclusion):
                candidate, result = one
                problem = result.problem
                if problem is None and result.digest in ids:
                    problem = Problem("duplicate audio", f"the samples are those of {ids[result.digest]}")
                if problem is None:
                    ids[result.digest] = candidate.utterance.id
                    utterance = _utterance(candidate, result)
                    if _is_copy(candidate):
                        final = _final(_audio(candidate), summary.manifest.parent)
                        staged.append((_audio(candidate), final))
                        utterance = replace(utterance, audio=final)
                    summary.add(utterance, tokenizer)
                    yield utterance
                    continue
                _remove_copy(candidate)
                one = Exclusion(candidate.utterance.id, *problem)
            if one.reason == NOT_SCORED:
                summary.not_scored += 1
            else:
                summary.left_out[one.reason] += 1
                left_out_file.write(json.dumps(asdict(one), ensure_ascii=False) + "\n")
    if not summary.kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary.left_out.most_common())
        raise ValueError(f"nothing is left to write a manifest of: {reasons or 'no utterance was found'}.")
    for written, final in staged:
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(written, final)


def _utterance(candidate: Candidate, result: CheckResult) -> Utterance:
    stated, audio = candidate.utterance, _audio(candidate)
    return Utterance(audio, candidate.recording.text, result.seconds, stated.speaker, stated.corpus, stated.split)


def _audio(candidate: Candidate) -> Path:
    return candidate.recording.cut_to or candidate.recording.path


def _is_copy(candidate: Candidate) -> bool:
    """Return whether the audio was written by us, for the corpus has it in another form."""
    return candidate.recording.cut_to is not None or candidate.utterance.contents is not None


def _final(path: Path, out: Path) -> Path:
    """Return where audio that was staged belongs."""
    return out / AUDIO / path.relative_to(out / STAGED)


def _remove_copy(candidate: Candidate) -> None:
    """Remove the file that was written for an utterance that is left out; the corpus still has the audio."""
    if _is_copy(candidate):
        _audio(candidate).unlink(missing_ok=True)
