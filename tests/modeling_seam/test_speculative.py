from types import SimpleNamespace

import pytest
from torch import nn
from transformers import GenerationConfig

from seam.modeling_seam.speculative import (
    DraftedBatch,
    Row,
    compact_rows,
    is_plain_greedy,
    is_shared,
    merged_settings,
    proposal_length,
    realign,
)


def test_proposal_length():
    def fresh(**measured):
        return Row(draft=list(range(90)), output=[], limit=200, **measured)

    everything = 10**6
    assert proposal_length([fresh()], 60, everything) == 90  # one forward for a good draft
    assert 0 < proposal_length([fresh() for _ in range(8)], 60, everything) < 45
    assert proposal_length([fresh(mismatches=4)], 60, everything) > 0  # 1 in 3 is believed to agree
    assert proposal_length([fresh(mismatches=8)], 60, everything) == 0  # 1 in 5: little to be gained
    assert proposal_length([fresh(mismatches=20) for _ in range(8)], 60, everything) == 0
    assert proposal_length([fresh() for _ in range(8)], 60, 24) == 3  # 24 positions may be lost
    assert proposal_length([fresh() for _ in range(8)], 60, -1) == 0
    assert proposal_length([fresh(position=90)], 60, everything) == 0  # nothing left
    assert proposal_length([Row([1, 2, 3], [], limit=2)], 60, everything) == 1  # and one token of the model's own


@pytest.mark.parametrize(
    ("output", "position", "expected"),
    [
        ([10, 11, 12, 99], 4, 4),  # 13 was replaced
        ([10, 11, 12, 14], 4, 5),  # 13 was left out
        ([10, 11, 12, 15], 4, 4),  # two left out, or one replaced: first the cheaper
        ([10, 11, 12, 15, 16], 5, 7),  # and then it is clear
        ([10, 11, 12, 99, 13], 5, 4),  # 99 was put in: one back
        ([10, 11, 12, 98, 99, 13, 14], 7, 5),
        ([99], 1, 1),
        ([11], 1, 2),
        ([10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 99], 10, 10),  # the draft is used up
    ],
)
def test_where_the_draft_goes_on(output, position, expected):
    assert realign(list(range(10, 20)), output, position) == expected


def test_an_empty_draft_has_no_place_to_go_on():
    assert realign([], [5, 6], 0) == 0


def test_the_last_rows_take_the_places_of_those_that_ended():
    assert compact_rows(5, []) == [0, 1, 2, 3, 4]
    assert compact_rows(5, [1, 4]) == [0, 3, 2]
    assert compact_rows(3, [0, 1, 2]) == []
    assert compact_rows(4, [0, 1]) == [2, 3]


def test_a_batch_from_drafts_to_transcripts():
    batch = DraftedBatch([[5, 6, 7], [5, 8], [4]], [[5], [5], []], limit=3, weights=60)
    assert [row.position for row in batch.rows] == [1, 1, 0]
    assert batch.propose() == [[6, 7], [8], [4]]
    # The first agrees and goes on to its limit, the second disagrees, the third agrees and ends.
    new, kept = batch.accept([[6, 7], [8], [4]], [[6, 7, 1], [9, 0, 0], [4, 2, 0]], ends={2})
    assert new == [[6, 7, 1], [9], [4, 2]]
    assert kept == [1] and batch.rows == [batch.all_rows[1]]
    assert batch.propose() == [[]]  # nothing of its draft is left
    assert batch.accept([[]], [[2]], ends={2}) == ([[2]], [])
    assert [row.output for row in batch.all_rows] == [[5, 6, 7, 1], [5, 9, 2], [4, 2]]
    assert [row.forwards for row in batch.all_rows] == [1, 2, 1]
    assert [(row.accepted, row.rejected) for row in batch.all_rows] == [(2, 0), (0, 1), (1, 0)]


def settings_of(**fields):
    return merged_settings(GenerationConfig(**fields), SimpleNamespace(generation_config=GenerationConfig()))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_new_tokens": 4, "eos_token_id": [1, 2], "pad_token_id": 0, "return_dict_in_generate": True},
        {"temperature": 0.3, "top_k": 5},  # read in sampling only
        {"num_beams": 1, "do_sample": False, "repetition_penalty": 1.0, "use_cache": True},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_plain(fields):
    assert is_plain_greedy(settings_of(**fields), {"streamer": None, "synced_gpus": False})


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 2},
        {"do_sample": True},
        {"output_scores": True},
        {"repetition_penalty": 1.3},
        {"suppress_tokens": [5]},
        {"cache_implementation": "quantized"},
        {"use_cache": False},
        {"stop_strings": ["a"]},
        {"max_time": 3.0},
        {"min_new_tokens": 4},
        {"a_setting_of_tomorrow": 1},
    ],
    ids=str,
)
def test_anything_else(fields):
    assert not is_plain_greedy(settings_of(**fields), {})


def test_arguments_and_the_models_own_settings_count():
    assert not is_plain_greedy(settings_of(), {"logits_processor": [object()]})
    model = SimpleNamespace(generation_config=GenerationConfig(suppress_tokens=[5], max_new_tokens=7))
    settings = merged_settings(GenerationConfig(max_new_tokens=3), model)
    assert settings["max_new_tokens"] == 3 and settings["suppress_tokens"] == [5]
    assert not is_plain_greedy(settings, {})


def test_weights_that_processes_share():
    model = nn.Linear(2, 2)
    assert not is_shared(model)
    model._is_fsdp_managed_module = True
    assert is_shared(model)
