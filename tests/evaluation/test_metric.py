"""The metric of the `evaluate` library: from a folder, without network, the same counts."""

import json
import os
import sys
from pathlib import Path

import pytest

import seam
from seam.tests.helpers import forked

FOLDER = Path(seam.__path__[0]) / "evaluation" / "metrics" / "seam_wer"
SCRIPT = """
import json, sys
import evaluate

metric = evaluate.load(sys.argv[1])
pairs = {"predictions": ["twenty five colours", "hello word"], "references": ["25 colors", "Hello, world! Uh."]}
metric.add_batch(**pairs)
results = [metric.compute(), metric.compute(**pairs, normalizer="basic")]
try:
    metric.compute(**pairs, normalizer="french")
except ValueError as error:
    results.append(str(error))
metric.compute(predictions=["\\u0915\\u093f"], references=["\\u0915\\u0940"])
print(json.dumps(results))
"""


@pytest.mark.medium
def test_it_loads_offline_and_counts(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = forked.run([sys.executable, "-c", SCRIPT, str(FOLDER)], env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    english, basic, refused = json.loads(done.stdout)
    # 25 colors | hello world: one word of four; 9 + 11 characters, one of them left out
    assert english == {"wer": 25, "cer": 5, "insertions": 0, "deletions": 0, "substitutions": 1, "words": 4}
    # 25 -> twenty, five put in, colors -> colours, world -> word, uh left out
    counts = {key: basic[key] for key in ("insertions", "deletions", "substitutions", "words")}
    assert counts == {"insertions": 1, "deletions": 1, "substitutions": 3, "words": 5} and basic["wer"] == 100
    assert "drops vowels and other marks of these references' script" in done.stderr
    assert "normalizer is 'french'; accepted: english, basic" in refused
