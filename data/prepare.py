"""From a corpus to a manifest: every utterance checked, and what is left out written down with the reason."""

import itertools
import json
import multiprocessing
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import quote

from tqdm.auto import tqdm

from seam.data import checks
from seam.data.checks import CheckResult, Recording, check_recording
from seam.data.corpora.utterances import NOT_SCORED, CorpusUtterance, Exclusion
from seam.data.files import replacing
from seam.data.manifest import CASINGS, Utterance, write_manifest

# Utterances that each worker may be ahead, so that a slow file does not hold up the others.
AHEAD = 32
# By the first bytes of a file; the name that a corpus gives to the bytes is believed where they say nothing.
SUFFIXES = {b"fLaC": ".flac", b"RIFF": ".wav", b"OggS": ".ogg", b"NIST": ".sph", b"ID3": ".mp3"}
SUFFIXES |= {
    bytes([0xFF, kind]): ".mp3" for kind in (0xFA, 0xFB, 0xF2, 0xF3, 0xE2, 0xE3)
}  # layer III of MPEG 1, 2, 2.5


@dataclass
class Summary:
    """
    Args:
        manifest, left_out_file: what was written.
        kept: number of utterances in the manifest, with `seconds` of audio.
        speakers: corpus and name of each that is known.
        left_out: how many were left out for each reason.
        not_scored: segments that the corpus itself excludes from scoring.
        tokens: of all kept transcripts, for each casing; empty without a tokenizer.
    """

    manifest: Path
    left_out_file: Path
    kept: int = 0
    seconds: float = 0.0
    speakers: set[tuple[str, str]] = field(default_factory=set)
    left_out: Counter = field(default_factory=Counter)
    not_scored: int = 0
    tokens: Counter = field(default_factory=Counter)


def load_tokenizer(name: str):
    """The tokenizer of a language model or of a checkpoint (folder or Hub id). Raises `ValueError` without one."""
    from transformers import AutoTokenizer

    import seam.configuration_seam  # noqa: F401 - a checkpoint's tokenizer then loads without trust_remote_code

    try:
        return AutoTokenizer.from_pretrained(name)
    except (ValueError, OSError) as error:
        raise ValueError(f"no tokenizer can be loaded from {name!r}: {error}") from error


def prepare(
    found: Iterable[CorpusUtterance | Exclusion],
    out: str | Path,
    *,
    max_seconds: float = 30.0,
    tokenizer=None,
    workers: int = 2,
    progress: bool = False,
) -> Summary:
    """
    Check every utterance of a corpus and write `manifest.jsonl`, and `left_out.jsonl` with `name`, `reason` and
    `detail` of each that failed. Audio that the corpus does not hold as a file of its own is written below `audio/`.
    Both files are the same for any number of workers. Of utterances with the same id, or the same samples, the first
    stays.

    Args:
        found: what a reader of `seam.data.corpora` yields.
        out: folder to write; a manifest that is there is replaced.
        max_seconds: longest utterance.
        tokenizer: of the language model; without it nobody checks that it gives the transcripts back.
        workers: processes that decode.

    Raises:
        ValueError: when nothing is left; what was written before stays.
    """
    out = Path(out).resolve()
    summary = Summary(out / "manifest.jsonl", out / "left_out.jsonl")
    found = iter(tqdm(found, desc="checking", unit=" utterances", disable=not progress))
    # A reader refuses a folder that is not its corpus with its first utterance: before anything is written.
    found = itertools.chain(list(itertools.islice(found, 1)), found)
    out.mkdir(parents=True, exist_ok=True)
    admitted = _admitted(found, out, max_seconds, tokenizer)
    write_manifest(summary.manifest, _kept(_checked(admitted, workers), summary, tokenizer))
    return summary


def _admitted(
    found: Iterable[CorpusUtterance | Exclusion], out: Path, max_seconds: float, tokenizer
) -> Iterator[Exclusion | tuple[CorpusUtterance, Recording]]:
    """What passes the checks that need no audio."""
    ids = set()
    for one in found:
        if isinstance(one, CorpusUtterance):
            if problem := _problem(one, ids, tokenizer):
                one = Exclusion(one.id, *problem)
            else:
                ids.add(one.id)
                one = one, _recording(one, out, max_seconds)
        yield one


def _problem(one: CorpusUtterance, ids: set[str], tokenizer) -> checks.Problem | None:
    for value in (one.text, one.id, one.speaker, one.corpus, one.split, str(one.audio)):
        if problem := checks.check_unicode(value):
            return problem
    if problem := checks.check_not_empty(one.text):
        return problem
    if one.id in ids:
        return checks.Problem("duplicate id", f"{one.audio} with text {one.text!r} is not the first of this id")
    if tokenizer is not None:
        from seam.processing_seam import transcript_ids

        text = one.text.strip()
        decoded = tokenizer.decode(transcript_ids(tokenizer, text), skip_special_tokens=True)
        return checks.check_tokenizer(text, decoded)
    return None


def _recording(one: CorpusUtterance, out: Path, max_seconds: float) -> Recording:
    """What to decode, after it was written to a file where the corpus has none."""
    path, cut_to = one.audio, None
    folder = out.joinpath("audio", *(_file_name(name) for name in (one.split, one.speaker) if name))
    if one.contents is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (_file_name(one.id) + _suffix(one))
        with replacing(path) as temporary:
            temporary.write_bytes(one.contents)
    elif one.segment is not None:
        cut_to = folder / f"{_file_name(one.id)}.flac"
    return Recording(path, one.text.strip(), one.segment, cut_to, one.sampling_rate, max_seconds)


def _file_name(name: str) -> str:
    """Another file name for each name, within one folder, whatever characters it has."""
    quoted = quote(name, safe=" ")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted


def _suffix(one: CorpusUtterance) -> str:
    for start, suffix in SUFFIXES.items():
        if one.contents.startswith(start):
            return suffix
    return one.audio.suffix


def _checked(
    admitted: Iterable[Exclusion | tuple[CorpusUtterance, Recording]], workers: int
) -> Iterator[Exclusion | tuple[CorpusUtterance, Recording, CheckResult]]:
    """The same, in the same order, with what the decoded audio says."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Exclusion | tuple[CorpusUtterance, Recording, Future]] = deque()
        for one in admitted:
            waiting.append(one if isinstance(one, Exclusion) else (*one, pool.submit(check_recording, one[1])))
            if len(waiting) > AHEAD * workers:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


def _result(
    one: Exclusion | tuple[CorpusUtterance, Recording, Future],
) -> Exclusion | tuple[CorpusUtterance, Recording, CheckResult]:
    return one if isinstance(one, Exclusion) else (one[0], one[1], one[2].result())


def _kept(
    checked: Iterable[Exclusion | tuple[CorpusUtterance, Recording, CheckResult]], summary: Summary, tokenizer
) -> Iterator[Utterance]:
    """What goes into the manifest; the rest goes to `summary.left_out_file`, and everything is counted."""
    digests: dict[bytes, str] = {}
    # Readers keep bytes that are not UTF-8 as surrogates; in a JSON string they are written as \udc80 to \udcff.
    with (
        replacing(summary.left_out_file) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace") as left_out_file,
    ):
        for one in checked:
            if not isinstance(one, Exclusion):
                found, recording, result = one
                problem = result.problem
                if problem is None and result.digest in digests:
                    problem = checks.Problem("duplicate audio", f"the samples are those of {digests[result.digest]}")
                if problem is None:
                    digests[result.digest] = found.id
                    utterance = _utterance(found, recording, result)
                    _count(summary, utterance, tokenizer)
                    yield utterance
                    continue
                one = Exclusion(found.id, *problem)
                _remove_made(found, recording)
            if one.reason == NOT_SCORED:
                summary.not_scored += 1
            else:
                summary.left_out[one.reason] += 1
                left_out_file.write(json.dumps(asdict(one), ensure_ascii=False) + "\n")
    if not summary.kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary.left_out.most_common())
        raise ValueError(f"nothing is left to write a manifest of: {reasons or 'no utterance was found'}.")


def _utterance(found: CorpusUtterance, recording: Recording, result: CheckResult) -> Utterance:
    audio = recording.cut_to or recording.path
    return Utterance(audio, recording.text, result.seconds, found.speaker, found.corpus, found.split)


def _remove_made(found: CorpusUtterance, recording: Recording) -> None:
    """The corpus still has what was left out: no file of ours stays behind."""
    if recording.cut_to is not None:
        recording.cut_to.unlink(missing_ok=True)
    if found.contents is not None:
        recording.path.unlink(missing_ok=True)


def _count(summary: Summary, utterance: Utterance, tokenizer) -> None:
    summary.kept += 1
    summary.seconds += utterance.duration
    if utterance.speaker:
        summary.speakers.add((utterance.corpus, utterance.speaker))
    if tokenizer is not None:
        from seam.processing_seam import transcript_ids

        for name, casing in CASINGS.items():
            summary.tokens[name] += len(transcript_ids(tokenizer, casing(utterance.text)))
