"""The loop of Stage 1 against the stock one on the same aligner, token for token."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from seam.modeling_seam import aligner_decoding, generation
from seam.modeling_seam.aligner_decoding import AlignerSteps, can_run, greedy_alignment, verified_alignment
from seam.modeling_seam.token_table import start_ids


def speech_of(model, lengths, longest):
    states = torch.randn(len(lengths), longest, model.config.aligner_config.d_model)
    return states, (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()


@pytest.fixture(scope="module", params=["linear", "table"])
def build_model(request, build_model, build_table_model):
    """Make models of both ways in which the aligner reads and writes tokens."""
    return {"linear": build_model, "table": build_table_model}[request.param]


@pytest.fixture(scope="module")
def model(build_model):
    return build_model()


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def ending(request, build_model):
    """Make a model whose random aligner ends rows after different numbers of tokens: <EOA> is one that it predicts."""
    model = build_model()
    model.set_attn_implementation(request.param)
    torch.manual_seed(0)
    states, mask = speech_of(model, [20] * 16, 20)
    decoded = model.align(states, mask).sequences
    # Of the tokens that some rows never write, the one that most rows write.
    counts = {t: int((decoded == t).any(-1).sum()) for t in set(decoded[:, 2:].flatten().tolist())}
    token = max((t for t, count in counts.items() if count < 12), key=counts.get)
    model.config.eoa_token_id = token
    return model


@pytest.fixture
def stock_align(monkeypatch):
    """`align` by the loop of `GenerationMixin`."""

    def align(model, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(generation, "can_run", lambda *_: False)
            return model.align(*args, **kwargs)

    return align


def assert_same(one, other):
    assert torch.equal(one.sequences.masked_fill(one.mask == 0, -1), other.sequences.masked_fill(other.mask == 0, -1))
    assert torch.equal(one.sequences, other.sequences)
    assert torch.equal(one.mask, other.mask)


@pytest.mark.medium
def test_is_the_stock_loop_token_for_token(ending, stock_align, monkeypatch):
    calls = []
    monkeypatch.setattr(
        generation, "greedy_alignment", lambda *args: calls.append(len(args[2])) or greedy_alignment(*args)
    )
    monkeypatch.setattr(aligner_decoding, "FIRST_POSITIONS", 4)  # the cache grows
    generator = torch.Generator().manual_seed(1)
    lengths, limit = set(), ending.config.max_alignment_tokens

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for case in range(75):
        torch.manual_seed(case)
        longest = draw(1, 40)
        states, mask = speech_of(ending, [draw(1, longest) for _ in range(draw(1, 16))], longest)
        if draw(0, 3) == 0:
            mask = None
        kwargs = {"max_new_tokens": draw(1, limit)} if draw(0, 1) else {}
        own, stock = ending.align(states, mask, **kwargs), stock_align(ending, states, mask, **kwargs)
        assert_same(own, stock)
        lengths |= set(own.mask.sum(-1).tolist())
    assert len(calls) == 75
    assert len(lengths) > 10 and limit in lengths, "the test needs rows that end early, and some that never do"


@pytest.mark.oldest
def test_predictions_and_distances_are_those_of_the_stock_loop(ending, stock_align):
    torch.manual_seed(2)
    states, mask = speech_of(ending, [9, 30, 17, 2, 25], 30)
    own = ending.align(states, mask, return_distances=True)
    stock = stock_align(ending, states, mask, return_distances=True)
    assert_same(own, stock)
    torch.testing.assert_close(own.distances, stock.distances)
    torch.testing.assert_close(own.aligned_embeds, stock.aligned_embeds)


@pytest.mark.parametrize("every", [3, 8])
def test_asking_less_often_changes_nothing(ending, monkeypatch, every):
    """As off the CPU, where rows that have ended go on for a while."""
    torch.manual_seed(3)
    states, mask = speech_of(ending, [9, 30, 17, 2, 25], 30)
    expected = ending.align(states, mask)
    monkeypatch.setattr(aligner_decoding, "looks_for_ends", lambda tokens, position: (position + 1) % every == 0)
    assert_same(ending.align(states, mask), expected)


def test_ended_rows_leave_the_batch(ending, monkeypatch):
    torch.manual_seed(4)
    states, mask = speech_of(ending, [20] * 12, 20)
    sizes, find = [], ending.lookup.nearest
    monkeypatch.setattr(ending.lookup, "nearest", lambda predicted: sizes.append(len(predicted)) or find(predicted))
    alignment = ending.align(states, mask)
    wanted = alignment.mask.sum(-1) + 1  # steps of each row: its tokens and <EOA>
    assert sizes == [int((wanted > step).sum()) for step in range(len(sizes))]
    assert min(sizes) < 12


def test_a_batch_that_has_ended_stops(build_model, predict_end):
    model = build_model()
    predict_end(model)
    states, mask = speech_of(model, [5, 6], 6)
    ids = (start_ids(model.config), model.config.eoa_token_id)
    sequences, _ = greedy_alignment(model.bridge, model.lookup, states, mask, *ids, 20)
    assert sequences.tolist() == [[ids[1]], [ids[1]]]
    assert model.align(states, mask).sequences.shape == (2, 0)


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_follows_the_predictions(build_model, dtype):
    """Every token is the nearest, or as near as rounding can tell, to what the parallel pass predicts for it."""
    model = build_model().to(dtype)
    torch.manual_seed(5)
    states, mask = speech_of(model, [9, 30, 17, 2, 25], 30)
    alignment = model.align(states.to(dtype), mask, return_distances=True)
    least = model.lookup.distances(alignment.aligned_embeds).min(-1).values
    excess = (alignment.distances - least)[alignment.mask.bool()]
    assert excess.numel() > 50
    assert (excess <= 0.02 * least[alignment.mask.bool()].abs().clamp_min(1)).float().mean() > 0.95


@pytest.mark.oldest
def test_the_active_vocabulary_is_all_that_is_decoded(build_model, stock_align):
    torch.manual_seed(6)
    model = build_model()
    states, mask = speech_of(model, [20] * 8, 20)
    decoded = model.align(states, mask).sequences.unique().tolist()
    some = build_model(active_vocabulary=decoded[::2])
    alignment = some.align(states, mask)
    assert set(alignment.sequences[alignment.mask.bool()].tolist()) <= set(decoded[::2])
    assert alignment.mask.any()
    assert_same(alignment, stock_align(some, states, mask))


@pytest.mark.oldest
def test_what_else_is_the_stock_loops(build_model):
    model = build_model()
    plain = GenerationConfig(max_new_tokens=4, eos_token_id=3, pad_token_id=3, return_dict_in_generate=True)
    assert can_run(model.bridge, plain, {"streamer": None})
    assert can_run(model.bridge, GenerationConfig(cache_implementation="static"), {})
    assert not can_run(model.bridge, plain, {"streamer": object()})
    assert not can_run(model.bridge.train(), plain, {})
    model.bridge.eval().generation_config.num_beams = 2
    assert not can_run(model.bridge, plain, {})
    compiled = build_model()
    compiled.bridge.compile(backend="eager")
    assert not can_run(compiled.bridge, plain, {})


@pytest.mark.oldest
def test_processors_act_on_stage_1(model):
    """They are the stock loop's; the first token is another one when it is forbidden."""
    torch.manual_seed(7)
    states, mask = speech_of(model, [20], 20)
    first = int(model.align(states, mask).sequences[0, 0])
    assert int(model.align(states, mask, suppress_tokens=[first]).sequences[0, 0]) != first


HOW = ("perfect", "empty", "wrong", "too long", "too short", "shuffled", "noisy", "gaps", "additions")


def corrupt(tokens: list[int], how: str, rng: random.Random) -> list[int]:
    """Make a draft of Stage 1's tokens."""
    draft, other = list(tokens), range(300)
    if how == "empty":
        return []
    if how == "wrong":
        return rng.choices(other, k=len(draft))
    if how == "too long":
        return draft + rng.choices(other, k=5)
    if how == "too short":
        return draft[: rng.randrange(len(draft) + 1)]
    if how == "shuffled":
        rng.shuffle(draft)
    if how == "noisy":
        draft = [rng.choice(other) if rng.random() < 0.2 else token for token in draft]
    if how == "gaps":
        draft = [token for token in draft if rng.random() > 0.2]
    if how == "additions":
        draft = [new for token in draft for new in ([token] if rng.random() > 0.2 else [rng.choice(other), token])]
    return draft


@pytest.mark.medium
@pytest.mark.parametrize("how", [*HOW, "mixed"])
def test_checking_a_draft_writes_what_the_loop_writes(ending, how, monkeypatch):
    monkeypatch.setattr(aligner_decoding, "FIRST_POSITIONS", 4)  # the cache grows
    rng = random.Random(how)
    ids = (start_ids(ending.config), ending.config.eoa_token_id)
    lengths, rejected = set(), 0
    for case in range(30):
        torch.manual_seed(case)
        longest, batch_size = rng.randint(1, 40), rng.choice([1, 1, 2, 3, 5, 8, 16])
        states, mask = speech_of(ending, [rng.randint(1, longest) for _ in range(batch_size)], longest)
        limit = rng.choice([1, 2, 7, ending.config.max_alignment_tokens])
        arguments = (ending.bridge, ending.lookup, states, mask if rng.random() < 0.8 else None, *ids, limit)
        with torch.no_grad():
            plain, embeds = greedy_alignment(*arguments)
            decoded = [[token for token in row if token != ids[1]] for row in plain.tolist()]
            drafts = [corrupt(row, rng.choice(HOW) if how == "mixed" else how, rng) for row in decoded]
            rows, predicted = verified_alignment(*arguments, drafts)
        for row, tokens, own, plain_own in zip(rows, decoded, predicted, embeds, strict=True):
            torch.testing.assert_close(own, plain_own[: len(own)], rtol=1e-3, atol=2e-4)
            assert len(own) == len(row.output)
            assert row.output == (tokens + [ids[1]])[:limit]
            assert len(row.output) <= row.forwards + row.accepted <= len(row.output) + 1
            lengths.add(len(tokens))
            rejected += row.rejected
            if how == "perfect" and batch_size == 1:
                assert row.forwards == 1
    assert len(lengths) > 8
    assert (rejected > 0) == (how not in ("perfect", "empty", "too short"))


def test_bad_drafts_are_given_up(ending):
    """A draft in which nothing is right costs a forward or two more than none, not one for every token."""
    torch.manual_seed(1)
    states, mask = speech_of(ending, [20], 20)
    limit = ending.config.max_alignment_tokens
    ids = (start_ids(ending.config), ending.config.eoa_token_id)
    with torch.no_grad():
        (row,), _ = verified_alignment(ending.bridge, ending.lookup, states, mask, *ids, limit, [[299] * limit])
    assert row.forwards == len(row.output) and 0 < row.rejected <= 60


@pytest.fixture
def steps_of(model):
    """Make steps, and the list of their predictions, `(rows, d_llm)` a step."""

    def make(states, mask):
        predictions = []
        lookup = SimpleNamespace(
            table=model.lookup.table,
            embed=model.lookup.embed,
            returnable=model.lookup.returnable,
            nearest=lambda predicted: predictions.append(predicted) or model.lookup.nearest(predicted),
        )
        return AlignerSteps(model.bridge, lookup, states, mask, []), predictions

    return make


@pytest.mark.oldest
@torch.no_grad()
def test_steps_are_the_aligners(model, steps_of):
    """One position after another, or several of each row, give what the aligner's own forward gives for all at once."""
    torch.manual_seed(8)
    states, mask = speech_of(model, [20, 11, 5], 20)
    ids = torch.randint(0, 300, (3, 9))
    expected = model.bridge(
        decoder_input_ids=ids,
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        attention_mask=mask,
        lookup=model.lookup,
    ).aligned_embeds
    steps, predictions = steps_of(states, mask)
    for position in range(9):
        predicted, _ = steps.next(ids[:, position], position)
        assert predicted is predictions[-1]
        torch.testing.assert_close(predicted, expected[:, position], rtol=1e-4, atol=1e-5)
    steps, predictions = steps_of(states, mask)
    done = [0, 0, 0]
    for counts in ([3, 1, 2], [1, 1, 1], [2, 5, 1], [3, 2, 5]):
        given = [ids[i, at : at + n].tolist() for i, (at, n) in enumerate(zip(done, counts, strict=True))]
        predicted, choices = steps.next_of_each(given, done)
        assert torch.equal(torch.cat(list(predicted)).flatten(0, -2), predictions[-1])
        assert [len(row) for row in choices] == counts
        own = torch.cat([expected[i, at : at + n] for i, (at, n) in enumerate(zip(done, counts, strict=True))])
        torch.testing.assert_close(predictions[-1], own, rtol=1e-4, atol=1e-5)
        assert sum(choices, []) == model.lookup.nearest(own).tolist()
        done = [at + n for at, n in zip(done, counts, strict=True)]
    assert done == [9, 9, 9]


@torch.no_grad()
def test_steps_go_back_and_rows_leave(model, steps_of):
    torch.manual_seed(9)
    states, mask = speech_of(model, [20, 11, 5, 8], 20)
    ids = torch.randint(0, 300, (4, 6))
    steps, predictions = steps_of(states, mask)
    steps.next_of_each([[7, 8, 9, 10]] * 4, [0] * 4)  # not what follows
    steps.keep([0, 3])
    steps.next_of_each([ids[0].tolist(), ids[3, :2].tolist()], [0, 0])
    expected = model.bridge(
        decoder_input_ids=ids[[0, 3]],
        encoder_outputs=BaseModelOutput(last_hidden_state=states[[0, 3]]),
        attention_mask=mask[[0, 3]],
        lookup=model.lookup,
    ).aligned_embeds
    torch.testing.assert_close(predictions[-1], torch.cat([expected[0], expected[1, :2]]), rtol=1e-4, atol=1e-5)
