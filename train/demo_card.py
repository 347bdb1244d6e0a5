"""`card.json` of the demo's checkpoints: what `seam.evaluation.card` says of them, besides the figures."""

from typing import Any

from seam.data.manifest import read_manifest
from seam.experiments.speech import SpeechSettings

SUMMARY = """\
A tiny checkpoint, small enough to live in a repository and trained offline, its encoder and its LLM included.
It understands spoken digits, single and in strings, and a grammar of home-assistant commands, in English."""
LIMITS = """\
Anything but digits and the commands of its grammar comes out as the nearest thing within them. Within them, the LLM
mostly copies what Stage 1 heard."""
CORPUS_LICENCES = {"fsdd": "Free Spoken Digit Dataset: CC BY-SA 4.0"}


def card_texts(speech: SpeechSettings, spoken: list[str]) -> dict[str, Any]:
    """
    Args:
        speech: settings of the training speech.
        spoken: how much was made, by round: "31000 utterances, 12.98 h".

    Returns:
        What `card.json` holds; see `seam.evaluation.card.CardTexts`.
    """
    data = f"{' and '.join(spoken)}: synthetic speech (espeak-ng)"
    licence = "synthetic speech: made with espeak-ng (GPL-3.0), of which nothing is in the checkpoint"
    if speech.people is not None:
        words = read_manifest(speech.people, "train", speech.people_corpus)
        speakers = ", ".join(sorted({word.speaker for word in words}))
        data += f", and utterances made from recordings of people saying single words ({speakers})"
        corpus = f"recordings of people ({speech.people_corpus}): not stated"
        licence += f"; {CORPUS_LICENCES.get(speech.people_corpus, corpus)}"
    own = "Apache-2.0 (trained from nothing)"
    return {
        "title": "SEAM, a tiny checkpoint",
        "summary": SUMMARY,
        "language": "en",
        "training_data": data + ".",
        "limits": LIMITS,
        "licences": {"encoder": own, "aligner": own, "language model": own, "training data": licence},
        "license": "apache-2.0",
    }
