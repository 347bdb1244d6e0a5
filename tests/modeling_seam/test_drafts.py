"""How much of a draft is proposed, where it goes on, and when it is given up."""

import pytest

from seam.modeling_seam.drafts import DraftedBatch, Row, close_ranks, proposal_length, resume


def test_proposal_length():
    def fresh(**measured):
        return Row(draft=list(range(90)), written=[], limit=200, **measured)

    everything = 10**6
    assert proposal_length([fresh()], 60, everything) == 90  # one forward for a good draft
    assert 0 < proposal_length([fresh() for _ in range(8)], 60, everything) < 45
    assert proposal_length([fresh(mismatches=4)], 60, everything) > 0  # 1 in 3 is believed to agree
    assert proposal_length([fresh(mismatches=8)], 60, everything) == 0  # 1 in 5: little to be gained
    assert proposal_length([fresh(mismatches=20) for _ in range(8)], 60, everything) == 0
    assert proposal_length([fresh() for _ in range(8)], 60, 24) == 3  # 24 positions may be lost
    assert proposal_length([fresh() for _ in range(8)], 60, -1) == 0
    assert proposal_length([fresh(place=90)], 60, everything) == 0  # nothing left
    assert proposal_length([Row([1, 2, 3], [], limit=2)], 60, everything) == 1  # and one token of the model's own


@pytest.mark.parametrize(
    ("written", "place", "expected"),
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
def test_where_the_draft_goes_on(written, place, expected):
    assert resume(list(range(10, 20)), written, place) == expected


def test_an_empty_draft_has_no_place_to_go_on():
    assert resume([], [5, 6], 0) == 0


def test_the_last_rows_take_the_places_of_those_that_ended():
    assert close_ranks(5, []) == [0, 1, 2, 3, 4]
    assert close_ranks(5, [1, 4]) == [0, 3, 2]
    assert close_ranks(3, [0, 1, 2]) == []
    assert close_ranks(4, [0, 1]) == [2, 3]


def test_a_batch_from_drafts_to_transcripts():
    batch = DraftedBatch([[5, 6, 7], [5, 8], [4]], [[5], [5], []], limit=3, weights=60)
    assert [row.place for row in batch.rows] == [1, 1, 0]
    assert batch.propose() == [[6, 7], [8], [4]]
    # The first agrees and goes on to its limit, the second disagrees, the third agrees and ends.
    new, kept = batch.read([[6, 7], [8], [4]], [[6, 7, 1], [9, 0, 0], [4, 2, 0]], ends={2})
    assert new == [[6, 7, 1], [9], [4, 2]]
    assert kept == [1] and batch.rows == [batch.everything[1]]
    assert batch.propose() == [[]]  # nothing of its draft is left
    assert batch.read([[]], [[2]], ends={2}) == ([[2]], [])
    assert [row.written for row in batch.everything] == [[5, 6, 7, 1], [5, 9, 2], [4, 2]]
    assert [row.forwards for row in batch.everything] == [1, 2, 1]
    assert [(row.accepted, row.rejected) for row in batch.everything] == [(2, 0), (0, 1), (1, 0)]
