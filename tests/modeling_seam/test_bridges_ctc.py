"""The CTC head: losses and paths worked out by hand, and the draft head that is one."""

from math import comb, log

import pytest
import torch

from seam.modeling_seam.bridges import CTCHead

pytestmark = pytest.mark.oldest

UNIFORM = log(1 / 4)  # of an untrained head that can output three ids


@pytest.fixture
def head() -> CTCHead:
    head = CTCHead(2, [3, 5, 9])
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    return head


def writes(path: list[int], token_ids: list[int], excluded_ids: list[int] = ()) -> CTCHead:
    """Make a head whose best outputs are `path`, whatever the speech: states are one-hot positions."""
    head = CTCHead(len(path), token_ids, excluded_ids)
    with torch.no_grad():
        head.head.bias.zero_()
        head.head.weight.zero_()
        for place, output in enumerate(path):
            head.head.weight[output, place] = 9.0
            head.head.weight[0, place] += 4.0  # the second best
    return head


def test_the_loss_is_of_all_paths_by_hand(head):
    """Two states, one token: the paths that collapse to it are (t, t), (t, blank) and (blank, t)."""
    torch.nn.init.normal_(head.head.weight, generator=torch.Generator().manual_seed(0))
    states = torch.eye(2)
    first, second = head(states).softmax(-1)
    for place, token in enumerate((3, 5, 9)):
        expected = first[place] * second[place] + first[place] * second[3] + first[3] * second[place]
        loss = head.loss(states[None], torch.ones(1, 2, dtype=torch.long), torch.tensor([[token]]))
        assert loss.item() == pytest.approx(-expected.log().item(), rel=1e-5)


def test_the_loss_is_summed_over_rows_of_different_lengths(head):
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    token_ids = torch.tensor([[5, 9], [3, -100]])
    # Three states and two tokens: C(3 + 2, 2 * 2) = 5 paths of 1/4^3. One state and one token: one path.
    expected = -(log(5) + 3 * UNIFORM) - UNIFORM
    assert head.loss(torch.zeros(2, 3, 2), mask, token_ids).item() == pytest.approx(expected, rel=1e-5)


def test_a_token_that_it_cannot_write_is_passed_over(head):
    states, mask = torch.zeros(1, 3, 2), torch.ones(1, 3, dtype=torch.long)
    losses = [head.loss(states, mask, torch.tensor([ids])).item() for ids in ([4, 5, 10], [5, -100, -100], [0, 4, 10])]
    # One token in three states: C(3 + 1, 2) = 6 paths. None: the path of blanks.
    assert losses == pytest.approx([-(log(6) + 3 * UNIFORM)] * 2 + [-3 * UNIFORM], rel=1e-5)


def test_a_transcript_that_does_not_fit_into_the_audio_adds_nothing(head):
    states, mask = torch.zeros(2, 2, 2), torch.ones(2, 2, dtype=torch.long)
    head.requires_grad_(True)
    loss = head.loss(states, mask, torch.tensor([[5, 5], [9, -100]]))  # the repeated token needs a blank between
    assert loss.item() == pytest.approx(-(log(3) + 2 * UNIFORM), rel=1e-5)
    loss.backward()
    assert torch.isfinite(head.head.bias.grad).all()


def test_the_best_path_is_collapsed_and_mapped_to_ids():
    blank = 3
    head = writes([blank, 1, 1, blank, 1, 2, 2, blank], [3, 5, 9])
    states, mask = torch.eye(8)[None].repeat(3, 1, 1), torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:], mask[2, 1:] = 0, 0
    ids, kept = head.decode(states, mask)
    assert ids.tolist() == [[5, 5, 9], [5, 5, 0], [0, 0, 0]]
    assert kept.tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert torch.equal(head.decode(states)[0], ids[:1].expand(3, -1))  # without a mask all states are speech


def test_nothing_is_heard():
    ids, mask = writes([1, 1], [7]).decode(torch.eye(2)[None])
    assert ids.shape == mask.shape == (1, 0)


def test_excluded_ids_are_never_decoded():
    head = writes([1, 2, 1], [3, 5, 9], excluded_ids=[5])
    assert head.decode(torch.eye(3)[None])[0].tolist() == [[3, 9, 3]]


def test_half_precision_and_its_place(head):
    head.to(torch.bfloat16)
    states = torch.zeros(1, 3, 2)
    assert head(states).dtype == torch.float32 and head.head.weight.dtype == torch.bfloat16
    loss = head.loss(states, torch.ones(1, 3, dtype=torch.long), torch.tensor([[5, 9]]))
    assert loss.item() == pytest.approx(-(log(5) + 3 * UNIFORM), rel=1e-5)
    assert set(head.state_dict()) == {"head.weight", "head.bias"}
    with torch.device("meta"):  # as models are built before they are loaded
        assert CTCHead(2, [3, 5, 9]).token_ids.tolist() == [3, 5, 9]


# ---- the draft head of a model ----


def test_the_draft_is_trained_through_forward(build_model, processor, waveforms):
    """A head that knows nothing: every path is as probable, and C(states + tokens - repeats, 2 * tokens) fit."""
    texts = ["one two three", "stop"]
    vocabulary = {token for text in texts for token in processor.transcript_ids(text)} | {0, 314}
    model = build_model().add_draft_head(vocabulary)
    for parameter in model.draft_head.requires_grad_(True).parameters():
        torch.nn.init.zeros_(parameter)
    inputs = processor(audio=waveforms[:2], text=texts)
    loss = model(**inputs, use_draft_head=True).loss
    expected, count = 0.0, 0
    lengths = model.encode(inputs["input_features"], inputs["attention_mask"])[1].sum(-1).tolist()
    for states, text in zip(lengths, texts, strict=True):
        ids = processor.transcript_ids(text)
        repeats = sum(one == other for one, other in zip(ids, ids[1:], strict=False))
        expected -= log(comb(states + len(ids) - repeats, 2 * len(ids))) + states * log(1 / (len(vocabulary) + 1))
        count += len(ids) + 1  # labels, with the end, as in the other losses
    assert loss.item() == pytest.approx(expected / count, rel=1e-4)
    assert model(**inputs, use_draft_head=True, num_items_in_batch=2 * count).loss.item() == pytest.approx(
        expected / count / 2, rel=1e-4
    )
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"draft_head.head.weight", "draft_head.head.bias"}


def test_a_model_without_a_draft_head_says_so(model, processor, waveforms):
    with pytest.raises(ValueError, match="no draft head; add_draft_head puts one in"):
        model(**processor(audio=waveforms[:1], text=["one"]), use_draft_head=True)
    assert model.draft_head is None


def test_ids_that_no_head_can_have_leave_the_model_alone(build_model):
    model = build_model()
    with pytest.raises(ValueError, match="draft_vocabulary holds 9999, outside"):
        model.add_draft_head([5, 9999])
    assert model.draft_head is None and model.config.draft_vocabulary is None
    with pytest.raises(ValueError, match="the bridge 'ctc' takes no draft; accepted: aligner"):
        build_model(bridge="ctc").add_draft_head([5])


def test_a_draft_head_stays_frozen_in_training(build_model):
    model = build_model(draft_vocabulary=[5, 9])
    assert not any(parameter.requires_grad for parameter in model.draft_head.parameters())
    model.train()
    assert not model.draft_head.training
    model.draft_head.requires_grad_(True)
    assert model.train().draft_head.training
