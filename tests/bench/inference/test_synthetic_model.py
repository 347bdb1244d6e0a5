"""Random weights that write a known text."""

import pytest
import torch

from seam.bench.inference.decoding_loops import Speech, Utterances
from seam.bench.inference.synthetic_model import build, lookup, random_projection, stock_whisper, successors


@pytest.fixture(scope="module")
def model():
    return build("tiny", "cpu")


def test_successors_go_round():
    assert successors(5, 3, 128) == [6, 7, 8]
    assert successors(126, 3, 128) == [127, 0, 1]
    assert successors(128 + 127, 2, 128) == [128, 129]


@torch.no_grad()
def test_both_loops_write_successors(model):
    utterances = Utterances(model, stock_whisper(model), lookup(model), Speech.random(model, 2), 140)
    # From <BOA>, which is 0, twice round the 64 dimensions.
    expected = [*range(1, 64), *range(64), *range(13)]
    assert utterances.stage_1().tokens == [expected, expected]
    assert utterances.stage_1_stock().tokens == [expected, expected]
    starts = [text[0] for text in utterances.aligned]
    assert utterances.llm().tokens == [successors(start, 140, 64) for start in starts] == utterances.transcripts
    assert starts[0] != starts[1]


@torch.no_grad()
def test_predictions_are_near_an_embedding(model):
    utterances = Utterances(model, stock_whisper(model), lookup(model), Speech.random(model, 1), 50)
    ids = torch.tensor([utterances.stage_1_text])
    predicted = model.teacher_forced(utterances.states, utterances.mask, ids)[0, :-1]
    embeds = model.get_input_embeddings()(ids[0])
    cosine = torch.nn.functional.cosine_similarity(predicted, embeds)
    assert 0.95 < cosine.mean() < 0.999
    model.bridge.output_projection, before = random_projection(model.bridge), model.bridge.output_projection
    predicted = model.teacher_forced(utterances.states, utterances.mask, ids)[0, :-1]
    model.bridge.output_projection = before
    every = torch.nn.functional.cosine_similarity(predicted[:, None], model.get_input_embeddings().weight, dim=-1)
    assert every.max() < 0.55


def test_whisper_has_the_layers_of_the_aligner(model):
    whisper = stock_whisper(model)
    assert whisper.model.decoder.layers is model.bridge.layers and whisper.model.encoder is model.encoder
    assert whisper.proj_out.weight is whisper.model.decoder.embed_tokens.weight
    assert whisper.proj_out.weight.shape == (51865, 64)
