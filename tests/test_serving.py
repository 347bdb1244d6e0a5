"""`transformers serve` with a saved checkpoint, in a process that has only the checkpoint's own code."""

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile

from seam.modeling_seam import load_checkpoint
from seam.tests.helpers import forked

pytestmark = [pytest.mark.medium, pytest.mark.oldest]

for package in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(package)
openai = pytest.importorskip("openai")

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
START_SECONDS = 180
SAYS_THE_PIPELINE = """
import json, sys
from transformers import pipeline
recognize = pipeline("automatic-speech-recognition", model=sys.argv[1], trust_remote_code=True, device="cpu")
print(json.dumps([recognize(file)["text"] for file in sys.argv[2:]]))
"""


def environment(home: Path) -> dict[str, str]:
    """Variables for a process without this package's path, offline, with caches of its own in `home`."""
    foreign = ("HF_", "TRANSFORMERS_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`transformers serve` on this machine, of the checkpoint in `model`, until `stop`."""

    def __init__(self, model: Path, folder: Path):
        self.model, self.port, self.log, self.home = str(model), free_port(), folder / "log.txt", folder / "home"
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", self.model, "--trust-remote-code"]
        command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment(self.home), cwd=folder, stdout=log, stderr=log)
        # A 500 is not tried again, and the variables for a proxy are not asked.
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key="none",
            max_retries=0,
            timeout=60,
            http_client=openai.DefaultHttpxClient(trust_env=False),
        )

    def wait(self):
        end = time.monotonic() + START_SECONDS
        while not self.is_ready():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.2)

    def is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def wait_for_log(self, text: str):
        """Wait for a text in the log, where the reason of an error is written after the answer."""
        end = time.monotonic() + 10
        while text not in self.log.read_text():
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def stop(self):
        self.client.close()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def transcribe(self, file: Path) -> str:
        with file.open("rb") as audio:
            return self.client.audio.transcriptions.create(model=self.model, file=audio).text

    def stream(self, file: Path) -> list[str]:
        """Return the data of each event of a stream: bare text, where the client's own parser expects JSON."""
        transcriptions = self.client.audio.transcriptions.with_streaming_response
        with (
            file.open("rb") as audio,
            transcriptions.create(model=self.model, file=audio, stream=True, timeout=20) as response,
        ):
            assert response.headers["content-type"].startswith("text/event-stream")
            return [line.removeprefix("data: ") for line in response.iter_lines() if line]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> dict[str, Path]:
    """Return a shipped recording, one in stereo at 44.1 kHz, silence, and one longer than the window of 4 s."""
    folder = tmp_path_factory.mktemp("recordings")
    files = {"wav": CHECKPOINTS / "recordings" / "audio" / "000000.wav"}
    waveform, rate = soundfile.read(CHECKPOINTS / "recordings" / "audio" / "000001.wav", dtype="float32")
    stereo = np.stack([librosa.resample(waveform, orig_sr=rate, target_sr=44100)] * 2, axis=1)
    for name, sound, sound_rate in (
        ("flac", stereo, 44100),
        ("silence", np.zeros(rate, dtype=np.float32), rate),
        ("long", np.concatenate([waveform, waveform]), rate),
    ):
        files[name] = folder / f"{name}.flac"
        soundfile.write(files[name], sound, sound_rate)
    return files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Return the shipped checkpoint as `save_pretrained` writes it: with its code."""
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    for part in load_checkpoint(str(CHECKPOINTS / "tiny")):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    server = Server(checkpoint, tmp_path_factory.mktemp("server"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def texts(checkpoint, recordings, tmp_path_factory) -> dict[str, str]:
    """Return the pipeline's transcript."""
    folder = tmp_path_factory.mktemp("pipeline")
    command = [sys.executable, "-c", SAYS_THE_PIPELINE, str(checkpoint), *map(str, recordings.values())]
    done = forked.run(command, env=environment(folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    return dict(zip(recordings, json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_the_server_runs_the_code_of_the_checkpoint(server):
    assert list((server.home / "modules").rglob("modeling_seam/generation.py"))


@pytest.mark.parametrize("name", ["wav", "flac", "silence"])
def test_the_client_gets_the_text_of_the_pipeline(server, recordings, texts, name):
    assert server.transcribe(recordings[name]) == texts[name]
    assert bool(texts[name]) == (name != "silence")


@pytest.mark.parametrize("name", ["wav", "flac", "silence"])
def test_streamed_pieces_are_the_text(server, recordings, texts, name):
    pieces = server.stream(recordings[name])
    assert "".join(pieces) == texts[name]
    assert len(pieces) > 1 or name == "silence"


def test_requests_at_the_same_time(server, recordings, texts):
    names = ["wav", "flac"] * 3
    with ThreadPoolExecutor(len(names)) as pool:
        assert list(pool.map(server.transcribe, [recordings[name] for name in names])) == [texts[n] for n in names]


@pytest.mark.parametrize("request_name", ["transcribe", "stream"])
def test_audio_longer_than_the_window_is_refused(server, recordings, request_name):
    """The server of transformers sends the client the status only; the reason is in its log."""
    with pytest.raises(openai.InternalServerError) as raised:
        getattr(server, request_name)(recordings["long"])
    assert raised.value.status_code == 500
    server.wait_for_log("longer than the encoder's window of 4 s")


@pytest.mark.parametrize("document", ["docs/publishing.md", "checkpoints/tiny/README.md"])
def test_the_documented_client_works(server, monkeypatch, tmp_path, capsys, document):
    text = (CHECKPOINTS.parent / document).read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python no-test\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    block = block.replace("localhost:8000", f"127.0.0.1:{server.port}")
    block = re.sub(r'model="[^"]*"', f"model={server.model!r}", block)
    shutil.copyfile(CHECKPOINTS / "recordings" / "audio" / "000000.wav", tmp_path / "recording.wav")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    exec(block, {})
    assert capsys.readouterr().out.strip() == "set the light to ten degrees"
