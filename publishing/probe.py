"""
Try what a user without this package does with a checkpoint. `selfcheck` runs it in a process of its own.

    python probe.py CHECK CHECKPOINT RECORDING

It prints its findings as one line of JSON. It must not import this package, and blocks it in case it is installed.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

sys.modules["seam"] = None  # any import of it fails

import numpy  # noqa: E402  not before seam is blocked
import soundfile  # noqa: E402  not before seam is blocked
import transformers  # noqa: E402  not before seam is blocked
from transformers import pipeline  # noqa: E402  not before seam is blocked

AUTO_MODELS = ("AutoModel", "AutoModelForSpeechSeq2Seq", "AutoModelForMultimodalLM")
OTHERS = ("AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoFeatureExtractor")


def load(name: str, checkpoint: str):
    """Load a checkpoint with an auto class."""
    return getattr(transformers, name).from_pretrained(checkpoint, trust_remote_code=True)


def logits_digest(model, processor, recording: str) -> str:
    """Return a digest of Stage 1's predictions for a recording and a text, and of the LLM's logits if there is one."""
    inputs = processor(audio=recording, text="one two three").to(model.device)
    model.eval()
    digest = hashlib.sha256()
    if not model.config.alignment_only:
        digest.update(model(**inputs).logits.detach().float().cpu().numpy().tobytes())
    digest.update(model(**inputs, use_llm=False).aligned_embeds.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def classes(checkpoint: str, recording: str) -> dict:
    """Return the class that each auto class loads."""
    return {name: type(load(name, checkpoint)).__name__ for name in (*OTHERS, *AUTO_MODELS)}


def no_trust(checkpoint: str, recording: str) -> dict:
    """Return whether loading without `trust_remote_code` is refused and runs no code of the checkpoint."""
    try:
        transformers.AutoModel.from_pretrained(checkpoint, trust_remote_code=False)
    except ValueError:
        return {"refused": not any("modeling_seam" in name for name in sys.modules)}
    return {"refused": False}


def forms(checkpoint: str, recording: str) -> dict:
    """Transcribe one recording in every form that the pipeline accepts."""
    pipe = pipeline("automatic-speech-recognition", model=checkpoint, trust_remote_code=True)
    waveform, rate = soundfile.read(recording, dtype="float32")
    assert rate == pipe.processor.sampling_rate, "the recording and the model differ in sampling rate"
    once = pipe(recording)["text"]
    texts = {
        "path": once,
        "bytes": pipe(Path(recording).read_bytes())["text"],
        "array": pipe(waveform)["text"],
        "dict": pipe({"array": waveform, "sampling_rate": rate})["text"],
        "dict, raw": pipe({"raw": waveform, "sampling_rate": rate})["text"],
        "two channels": pipe({"array": [waveform.tolist()] * 2, "sampling_rate": rate})["text"],
        "list, batch_size=2": pipe([recording] * 3, batch_size=2)[2]["text"],
        "generator": list(pipe(one for one in [recording, waveform]))[1]["text"],
        "generate_kwargs": pipe(recording, generate_kwargs={"num_beams": 1, "do_sample": False})["text"],
    }
    with tempfile.TemporaryDirectory() as folder:
        flac = f"{folder}/recording.flac"
        soundfile.write(flac, waveform, rate, subtype="PCM_16")
        texts["flac"] = pipe(flac)["text"]
    # Audio longer than a window: the joined texts of its pieces, nothing lost and nothing twice.
    count = int(pipe.processor.max_seconds * rate / len(waveform)) + 2
    longer = numpy.concatenate([waveform, numpy.zeros(rate // 2, numpy.float32)] * count)
    pieces = [pipe(piece)["text"] for piece in pipe.processor.split(longer)]
    texts["over a window"] = once if pipe(longer)["text"] == " ".join(filter(None, pieces)) else pipe(longer)["text"]
    return texts


def logits(checkpoint: str, recording: str) -> dict:
    """Return digests of the logits before and after saving and loading twice."""
    processor, model = load("AutoProcessor", checkpoint), load("AutoModel", checkpoint)
    digests = {"loaded": logits_digest(model, processor, recording)}
    if "--once" in sys.argv:
        return digests
    with tempfile.TemporaryDirectory() as folder:
        for name in ("saved once", "saved twice"):
            here = f"{folder}/{name.split()[1]}"
            model.save_pretrained(here)
            processor.save_pretrained(here)
            processor, model = load("AutoProcessor", here), load("AutoModel", here)
            digests[name] = logits_digest(model, processor, recording)
    return digests


if __name__ == "__main__":
    check = {function.__name__: function for function in (classes, no_trust, forms, logits)}[sys.argv[1]]
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(json.dumps(check(sys.argv[2], sys.argv[3])))
