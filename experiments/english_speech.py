"""Speech of people for the English checkpoint: its text as readers expect it, and the conditions of everyday audio."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import kaldialign
import numpy as np
import soxr
from huggingface_hub.dataclasses import strict
from scipy import signal
from tqdm.auto import tqdm

from seam.data.augmentation import SAMPLE_RATE, add_noise, mix
from seam.data.checks import write_audio
from seam.data.files import repair_json_lines
from seam.data.manifest import Utterance, read_manifest, write_manifest
from seam.evaluation.scoring import words
from seam.evaluation.transcription import transcribe
from seam.experiments.waveform_augmentation import augment
from seam.modeling_seam import load_checkpoint
from seam.processing_seam import SeamProcessor

LABEL_BATCH, LABEL_TOKENS = 16, 160
# Corpora of capitals without punctuation that are long enough for a recogniser to know where sentences end.
TRANSCRIBED = ("librispeech train-clean-100", "librispeech_tc")
# Corpora whose text is published as people write it.
NATURAL = ("common_voice", "kathleen", "ljspeech", "african_storybook")
# Never trained on: parts of the official evaluation sets.
EVALUATION_ONLY = ("librispeech dev-clean", "librispeech test-other")
NOTHING = ""  # in an alignment, opposite to a word that the other side lacks
MAX_LABEL_ERROR_RATE = 60.0
SHORT_WORD = 3  # letters of words that are hardly ever names
SHORT_SECONDS, JOINED_SECONDS = 8.0, 28.0
QUESTION = re.compile(
    r"(who|what|when|where|why|how|which|whose|do|does|did|is|are|was|were|can|could|will|would|shall|should|may|have|"
    r"has|isn't|aren't|don't|won't) ",
    re.IGNORECASE,
)


@strict
@dataclass
class EnglishSpeech:
    """
    What the English checkpoint hears in training.

    Args:
        corpora: audiofolders with the splits `train` and `dev`.
        hours: of training speech, by corpus, where it is not all.
        later_share: share of the speakers (of a corpus of one speaker: of the utterances) that Stages 2 and 3 have for
            themselves.
        varied_share: share of the utterances that are changed: noise, other voices, telephone, rooms, pauses, tempo.
        joined_share: share of the short utterances that are joined, several in a window, with pauses between them.
        silent: number of recordings without speech, whose transcript is empty.
        validation: number of utterances for evaluations during the training, from all corpora.
        test: number of utterances in a test set, at most.
        seed: of everything random.
    """

    corpora: list[str] = field(default_factory=lambda: ["../shared/speech", "../shared/speech_en"])
    hours: dict[str, float | int] = field(default_factory=dict)
    later_share: float = 0.25
    varied_share: float = 0.25
    joined_share: float = 0.3
    silent: int = 100
    validation: int = 64
    test: int = 60
    seed: int = 0


# ---- text ----


def sentence(text: str) -> str:
    """Write words in capitals, or without punctuation, as a sentence: capital, the pronoun I, letters, a full stop."""
    spelled = [word.upper() if len(word) == 1 and word.lower() != "a" else word for word in text.lower().split()]
    if spelled and all(len(word) == 1 for word in spelled):
        spelled = [word.upper() for word in spelled]
    written = re.sub(r"\bi'", "I'", " ".join(spelled))
    written = written[:1].upper() + written[1:]
    if written and written[-1].isalnum():
        written += "?" if QUESTION.match(written) else "."
    return written


def unquoted(text: str) -> str:
    """Undo the quoting of a table of comma-separated values."""
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1].replace('""', '"')
    return text.strip()


def with_case_of(reference: str, transcript: str) -> str | None:
    """
    Write the words of a reference with the case and the punctuation of a recogniser's transcript.

    Args:
        reference: without case and punctuation.
        transcript: of the same speech.

    Returns:
        The transcript itself where its words are the reference's, under the English normaliser; otherwise the
        reference's words, of which those that were recognised are as in the transcript. `None` where more than
        `MAX_LABEL_ERROR_RATE` of them were not.
    """
    if words(reference, "english") == words(transcript, "english"):
        return transcript
    hypothesis = [re.fullmatch(r"(\W*)(.*?)(\W*)", word).groups() for word in transcript.replace("-", " ").split()]
    hypothesis = [parts for parts in hypothesis if parts[1]]
    spoken = reference.lower().split()
    pairs = kaldialign.align(spoken, [core.lower() for _, core, _ in hypothesis], NOTHING)
    errors = sum(one != other for one, other in pairs)
    if errors > MAX_LABEL_ERROR_RATE / 100 * len(spoken):
        return None
    written: list[str] = []
    left = iter(hypothesis)
    for word, found in pairs:
        before, core, after = next(left) if found != NOTHING else ("", "", "")
        if word == NOTHING:  # it was not said; where a sentence ends here, it still does
            if written and after and written[-1][-1].isalnum():
                written[-1] += after
            continue
        if found == NOTHING and written:  # the sentence did not end before it
            written[-1] = written[-1].rstrip(".?!")
        begins = not written or written[-1][-1] in ".?!"
        if words(word, "english") == words(core, "english"):  # the same, or "Mr" for "mister"
            own = core
        else:
            own = "I" if word == "i" else word
            # Within a sentence, capitals of words that were misheard are nearly always those of names.
            is_name = core[:1].isupper() and len(word) > SHORT_WORD
            if is_name or (begins and (core[:1].isupper() or not written)):
                own = own[:1].upper() + own[1:]
            if "'" in own:  # "Carras'" for "Kara's"
                after = after.removeprefix("'")
        written.append(before + own + after)
    return " ".join(written)


def labelled(utterances: Sequence[Utterance], transcripts: dict[str, str]) -> Iterator[Utterance]:
    """Yield utterances with the text that they are trained on; those whose text cannot be trusted are left out."""
    for one in utterances:
        text: str | None
        if one.corpus in NATURAL:
            text = unquoted(one.text)
        elif one.corpus in TRANSCRIBED:
            text = with_case_of(one.text, transcripts[one.audio.name]) if one.audio.name in transcripts else None
        else:
            text = sentence(one.text)
        if text:
            yield replace(one, text=text)


def transcribe_for_labels(utterances: Sequence[Utterance], checkpoint: str, path: Path) -> dict[str, str]:
    """
    Transcribe utterances with Stage 1 of a checkpoint.

    Args:
        path: of the transcripts, which are kept as they come: an interrupted run goes on.

    Returns:
        Transcripts by the names of the audio files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {row["audio"]: row["text"] for row in repair_json_lines(path)}
    left = [one for one in utterances if one.audio.name not in done]
    if not left:
        return done
    model, processor = load_checkpoint(checkpoint)
    for start in tqdm(range(0, len(left), LABEL_BATCH), desc="labels"):
        batch = left[start : start + LABEL_BATCH]
        results = transcribe(
            model, processor, [one.audio for one in batch], LABEL_BATCH, use_llm=False, max_new_tokens=LABEL_TOKENS
        )
        with path.open("a", encoding="utf-8") as file:
            for one, result in zip(batch, results, strict=True):
                done[one.audio.name] = result.text
                file.write(json.dumps({"audio": one.audio.name, "text": result.text}, ensure_ascii=False) + "\n")
    return done


# ---- which recordings ----


def choose(speech: EnglishSpeech, rng: np.random.Generator) -> list[Utterance]:
    """Return the training recordings, each corpus up to its hours, in random order."""
    by_corpus = defaultdict(list)
    for corpus in speech.corpora:
        for one in read_manifest(corpus, "train"):
            by_corpus[one.corpus].append(one)
    chosen = []
    for corpus, utterances in sorted(by_corpus.items()):
        if corpus in EVALUATION_ONLY:
            continue
        seconds = 3600 * speech.hours.get(corpus, float("inf"))
        for index in rng.permutation(len(utterances)):
            if seconds <= 0:
                break
            seconds -= utterances[index].duration
            chosen.append(utterances[index])
    return [chosen[index] for index in rng.permutation(len(chosen))]


def split_by_speaker(
    utterances: Sequence[Utterance], share: float, rng: np.random.Generator
) -> tuple[list[Utterance], list[Utterance]]:
    """
    Split off a share of the speakers of every corpus; of a corpus of one speaker, of its utterances.

    A speaker who is in several corpora is in one part with all of them.
    """
    speakers = defaultdict(set)
    for one in utterances:
        speakers[one.corpus].add(one.speaker)
    later: set[str] = set()
    for _, names in sorted(speakers.items()):
        if len(names) > 1:
            later.update(rng.permutation(sorted(names))[: max(round(share * len(names)), 1)])
    parts: tuple[list[Utterance], list[Utterance]] = ([], [])
    for one in utterances:
        alone = len(speakers[one.corpus]) == 1
        parts[rng.random() < share if alone else one.speaker in later].append(one)
    return parts


# ---- sound ----


def telephone(audio: np.ndarray) -> np.ndarray:
    """Pass audio `(samples,)` through a telephone: 300 to 3400 Hz, 8 kHz, 8 bits by the mu-law."""
    band = signal.butter(4, (300, 3400), "bandpass", fs=SAMPLE_RATE, output="sos")
    narrow = soxr.resample(signal.sosfilt(band, audio), SAMPLE_RATE, 8000).clip(-1, 1)
    levels = np.round(127 * np.sign(narrow) * np.log1p(255 * np.abs(narrow)) / np.log(256)) / 127
    expanded = np.sign(levels) * np.expm1(np.abs(levels) * np.log(256)) / 255
    return soxr.resample(expanded, 8000, SAMPLE_RATE).astype(np.float32)


def pause(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Return a pause of so many seconds, with noise far below speech."""
    return 10 ** (-rng.uniform(60, 80) / 20) * rng.standard_normal(int(seconds * SAMPLE_RATE), dtype=np.float32)


def vary(audio: np.ndarray, others: Callable[[], np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """
    Change audio as everyday recordings differ from studio ones.

    Args:
        audio: `(samples,)` at 16 kHz.
        others: returns other people's speech.
    """
    kind = rng.random()
    if kind < 0.25:
        return telephone(augment(audio, rng, 0.2))
    if kind < 0.45:
        babble = np.sum([np.resize(others(), len(audio)) for _ in range(int(rng.integers(1, 5)))], axis=0)
        return mix(audio, babble, rng.uniform(5, 20))
    if kind < 0.7:
        return add_noise(audio, rng, (0, 20))
    if kind < 0.85:
        return np.concatenate([pause(rng.uniform(0.3, 2), rng), audio, pause(rng.uniform(0.3, 2), rng)])
    return augment(audio, rng, 0.35)


class Speech:
    """
    Write the recordings of one part of the training speech.

    Args:
        settings: of the recipe.
        folder: of the audio files that are made.
        rng: source of all randomness.
    """

    def __init__(self, settings: EnglishSpeech, folder: Path, processor: SeamProcessor, rng: np.random.Generator):
        self.settings, self.folder, self.processor, self.rng = settings, folder, processor, rng
        self.made = 0
        folder.mkdir(parents=True, exist_ok=True)

    def make(self, utterances: list[Utterance], silent: int) -> Iterator[Utterance]:
        """Yield all recordings: some as they are, some joined, some changed, and silent ones."""
        self._pool = utterances
        joined: list[Utterance] = []
        for one in tqdm(utterances, desc=self.folder.name):
            if one.duration < SHORT_SECONDS and self.rng.random() < self.settings.joined_share:
                joined.append(one)
                if len(joined) == 4 or sum(part.duration + 1.5 for part in joined) > JOINED_SECONDS - SHORT_SECONDS:
                    yield self._join(joined)
                    joined = []
            elif self.rng.random() < self.settings.varied_share and one.duration < JOINED_SECONDS - 4:
                yield self._write(vary(self._load(one), self._other, self.rng), one)
            else:
                yield one
        yield from joined
        for _ in range(silent):
            seconds = self.rng.uniform(0.5, 10)
            level = 10 ** (-self.rng.uniform(30, 80) / 20)
            noise = level * add_noise(np.zeros(int(seconds * SAMPLE_RATE), np.float32), self.rng, (0, 0)) / 1e-4
            yield self._write(np.asarray(noise, np.float32), Utterance(self.folder, "", seconds, corpus="silence"))

    def _load(self, one: Utterance) -> np.ndarray:
        return self.processor.load_audio(one.audio)

    def _other(self) -> np.ndarray:
        return self._load(self._pool[int(self.rng.integers(len(self._pool)))])

    def _join(self, parts: list[Utterance]) -> Utterance:
        pieces = []
        for part in parts:
            pieces += [self._load(part), pause(self.rng.uniform(0.2, 1.5), self.rng)]
        text = " ".join(part.text for part in parts)
        return self._write(np.concatenate(pieces[:-1]), replace(parts[0], text=text))

    def _write(self, audio: np.ndarray, like: Utterance) -> Utterance:
        """Write audio to a file of its own, within [-1, 1], and return its utterance."""
        path = self.folder / f"{self.made:06d}.flac"
        self.made += 1
        audio = audio / max(1.0, float(np.abs(audio).max(initial=0)))
        write_audio(path, audio, SAMPLE_RATE)
        return replace(like, audio=path, duration=len(audio) / SAMPLE_RATE)


def make_training_speech(speech: EnglishSpeech, folder: Path, checkpoint: str) -> str:
    """
    Write `alignment.jsonl` for Stage 1 and `later.jsonl` for Stages 2 and 3.

    Args:
        checkpoint: untrained, whose Stage 1 says where sentences of corpora in capitals begin and end.

    Returns:
        What was made.
    """
    rng = np.random.default_rng(speech.seed)
    chosen = choose(speech, rng)
    transcribed = [one for one in chosen if one.corpus in TRANSCRIBED]
    transcripts = transcribe_for_labels(transcribed, checkpoint, folder / "whisper.jsonl")
    usable = list(labelled(chosen, transcripts))
    processor = SeamProcessor.from_pretrained(checkpoint)
    said = [f"{len(chosen) - len(usable)} of {len(chosen)} left out, for their text was not recognised"]
    for name, part in zip(("alignment", "later"), split_by_speaker(usable, speech.later_share, rng), strict=True):
        silent = round(speech.silent * len(part) / len(usable))
        made = list(Speech(speech, folder / name, processor, rng).make(part, silent))
        # By length: batches of the encoder are in order, and padded little. Training draws them at random.
        write_manifest(folder / f"{name}.jsonl", sorted(made, key=lambda one: one.duration))
        said.append(f"{name}: {len(made)} recordings, {sum(one.duration for one in made) / 3600:.2f} h")
    return "; ".join(said)


def make_test_speech(speech: EnglishSpeech, folder: Path, processor: SeamProcessor) -> str:
    """
    Write a manifest of each kind of held-out speech, with the published text, and `validation.jsonl` of all.

    The kinds are the corpora, those of the first folder together ("people"), and people with noise and by telephone.
    A speaker of any `train` is in none of them: `dev` of one corpus may have readers of another's `train`.
    """
    rng = np.random.default_rng(speech.seed + 1)
    heard = {one.speaker for corpus in speech.corpora for one in read_manifest(corpus, "train")} - {""}
    by_kind = defaultdict(list)
    for corpus in speech.corpora:
        for one in read_manifest(corpus, "dev"):
            if one.duration <= 30 and one.corpus not in ("fsdd", "ljspeech"):
                by_kind["people" if corpus == speech.corpora[0] else one.corpus].append(one)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    some, tests = [], {}
    for kind, utterances in by_kind.items():
        drawn = [utterances[index] for index in rng.permutation(len(utterances))]
        some += drawn[: speech.validation // len(by_kind)]
        tests[kind] = drawn if kind == "people" else drawn[: speech.test]
    for kind, change in (("noisy", lambda audio: add_noise(audio, rng, (5, 10))), ("telephone", telephone)):
        tests[kind] = []
        for one in tests["people"][: speech.test // 2]:
            path = folder / "audio" / f"{kind}-{one.audio.stem}.flac"
            audio = change(processor.load_audio(one.audio))
            write_audio(path, audio / max(1.0, float(np.abs(audio).max(initial=0))), SAMPLE_RATE)
            tests[kind].append(replace(one, audio=path))
    tests = {kind: [one for one in utterances if one.speaker not in heard] for kind, utterances in tests.items()}
    write_manifest(folder / "validation.jsonl", [one for one in some if one.speaker not in heard])
    for kind, utterances in tests.items():
        write_manifest(folder / f"test-{kind}.jsonl", utterances)
    return ", ".join(f"{kind} {len(utterances)}" for kind, utterances in sorted(tests.items()))
