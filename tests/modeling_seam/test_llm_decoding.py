"""Verifying a draft gives the output of plain greedy search, and how much work that is."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MaxLengthCriteria,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    StoppingCriteriaList,
)

from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.modeling_seam.aligner import CACHE
from seam.modeling_seam.generation_io import LOOKUP
from seam.modeling_seam.llm_decoding import WEIGHTS_IN_POSITIONS, can_verify, keep_rows, verified_greedy
from seam.modeling_seam.prompt import left_pad
from seam.modeling_seam.speculative import Row

PAD, WORDS = 0, range(3, 40)
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,  # wide: every token makes a difference
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    # One layer of two sees a window only, which is shorter than the prompts.
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SIZES, sliding_window=5, query_pre_attn_scalar=8)),
}


def build(kind: str, seed: int = 0):
    torch.manual_seed(seed)
    model_class, config = KINDS[kind]
    return model_class(config).eval()


@pytest.fixture(scope="module", params=KINDS)
def language_model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def qwen3():
    return build("qwen3")


class Task:
    """Prompts of random embeddings and the output of `generate` after them: `sequences`, without padding `rows`."""

    def __init__(self, language_model, batch_size, limit, ends, guided=False, seed=0, **settings):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 12, (batch_size,), generator=generator).tolist()
        self.guides = torch.randint(3, 40, (batch_size, int(guided)), generator=generator)
        embed = language_model.get_input_embeddings()
        rows = [torch.randn(length, 32, generator=generator) for length in lengths]
        with torch.no_grad():
            self.embeds, self.mask = left_pad(
                [torch.cat([row, embed(guide)]) for row, guide in zip(rows, self.guides, strict=True)]
            )
        self.config = GenerationConfig(max_new_tokens=limit, eos_token_id=ends, pad_token_id=PAD, **settings)
        self.ends = {ends} if isinstance(ends, int) else set(ends)
        shown = {"input_ids": self.guides} if guided else {}
        self.sequences = language_model.generate(
            inputs_embeds=self.embeds, attention_mask=self.mask, generation_config=self.config, **shown
        )
        self.transcripts = []
        for row in self.sequences.tolist():
            end = [i for i, token in enumerate(row) if i >= int(guided) and token in self.ends]
            self.transcripts.append(row[: end[0]] if end else row)

    def check(self, language_model, drafts, **kwargs) -> list[Row]:
        rows = verified_greedy(
            language_model,
            self.embeds,
            self.mask,
            drafts,
            self.guides.tolist(),
            self.config.max_new_tokens,
            self.ends,
            **kwargs,
        )
        longest = max(len(row.output) for row in rows)
        assert [row.output + [PAD] * (longest - len(row.output)) for row in rows] == self.sequences.tolist()
        return rows


def corrupt(transcript: list[int], how: str, rng: random.Random) -> list[int]:
    """Make a draft of a transcript."""
    draft, word, place = list(transcript), rng.choice(WORDS), rng.randrange(len(transcript) or 1)
    if how == "empty":
        return []
    if how == "wrong":
        return [rng.choice(WORDS) for _ in transcript]
    if how == "too long":
        return draft + [rng.choice(WORDS) for _ in range(rng.randrange(1, 9))]
    if how == "too short":
        return draft[:place]
    if how == "shuffled":
        rng.shuffle(draft)
    if how == "substitution":
        draft[place : place + 1] = [word]
    if how == "insertion":
        draft.insert(place, word)
    if how == "deletion":
        del draft[place : place + 1]
    if how == "ends within":
        draft.insert(place, 2)
    if how == "noisy":
        draft = [token if rng.random() < 0.8 else rng.choice(WORDS) for token in draft]
    return draft  # else perfect


HOW = [
    *("empty", "wrong", "too long", "too short", "shuffled", "perfect"),
    *("substitution", "insertion", "deletion", "ends within", "noisy"),
]


@pytest.mark.medium
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8, 12, 16])
def test_any_draft_gives_the_tokens_of_greedy_search(language_model, batch_size, guided):
    """2 x 3 x 7 x 48 batches: 42 x 48 = 2,016, in which 13,536 rows are verified."""
    rng = random.Random(batch_size)
    forwards = 0
    for seed in range(4):
        ends = [2, [2, 11, 17], 23, [5, 8]][seed]
        task = Task(language_model, batch_size, limit=[14, 9, 14, 2][seed], ends=ends, guided=guided, seed=seed)
        for how in [*HOW, "mixed"]:
            drafts = []
            for transcript, guide in zip(task.transcripts, task.guides.tolist(), strict=True):
                kind = rng.choice(HOW) if how == "mixed" else how
                drafts.append(guide + corrupt(transcript[len(guide) :], kind, rng))
            forwards += sum(row.forwards for row in task.check(language_model, drafts))
    assert forwards < 48 * batch_size * 14  # the drafts were used


@pytest.mark.oldest
def test_a_static_cache_gives_the_same_tokens(qwen3):
    rng = random.Random(0)
    for batch_size in (1, 4, 9):
        task = Task(qwen3, batch_size, 12, [2, 11, 17], cache_implementation="static")
        assert can_verify(qwen3, task.config, {})
        for how in HOW:
            task.check(qwen3, [corrupt(one, how, rng) for one in task.transcripts], static_cache=True)


@pytest.fixture(scope="module")
def distinct(qwen3):
    """One utterance of twelve different tokens and an end."""
    for seed in range(300):
        probe = Task(qwen3, 1, 13, 2, seed=seed)
        tokens = probe.sequences[0].tolist()
        if len(set(tokens)) == 13 and 2 not in tokens:
            task = Task(qwen3, 1, 30, tokens[12], seed=seed)
            assert task.transcripts == [tokens[:12]]
            return task
    pytest.fail("no prompt makes the random model output 13 different tokens")


@pytest.mark.parametrize(
    ("change", "forwards", "accepted", "rejected"),
    [
        (lambda draft, new: draft, 1, 12, 0),
        (lambda draft, new: draft + [new], 1, 12, 1),  # the end is the model's own token
        (lambda draft, new: draft[:5] + [new] + draft[6:], 2, 11, 7),  # 5 and 6 agree; 7 were proposed in vain
        (lambda draft, new: draft[:5] + [new] + draft[5:], 2, 11, 8),  # the model's token is the next of the draft
        # The model's token is in no draft: first taken for a substitution, then seen to be left out.
        (lambda draft, new: draft[:5] + draft[6:], 3, 5 + 5, 6 + 5),
        (lambda draft, new: draft[:5] + [new, new] + draft[7:], 3, 10, 7 + 6),  # each is met once
        (lambda draft, new: [], 13, 0, 0),
    ],
    ids=["perfect", "too long", "substitution", "insertion", "deletion", "two substitutions", "empty"],
)
def test_forwards_and_tokens_are_counted(qwen3, distinct, change, forwards, accepted, rejected):
    transcript = distinct.transcripts[0]
    new = next(word for word in WORDS if word not in distinct.sequences[0].tolist())
    (row,) = distinct.check(qwen3, [change(transcript, new)])
    assert (row.forwards, row.accepted, row.rejected) == (forwards, accepted, rejected)


class Watched:
    """The batch size and number of positions of each forward of a language model."""

    def __init__(self, language_model):
        self.shapes = []
        self.hook = language_model.register_forward_pre_hook(
            lambda _, args, kwargs: self.shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
        )

    def __enter__(self):
        return self.shapes

    def __exit__(self, *exception):
        self.hook.remove()


def test_rows_that_have_ended_leave_the_batch(qwen3):
    task = Task(qwen3, 8, 14, [2, 11, 17])
    lengths = sorted({len(one) for one in task.transcripts})
    assert len(lengths) > 2, "the test needs transcripts of different lengths"
    with Watched(qwen3) as shapes:
        rows = task.check(qwen3, [[]] * 8)
    assert [batch for batch, _ in shapes] == [
        sum(len(row.output) > step for row in rows) for step in range(max(len(row.output) for row in rows))
    ]


@pytest.mark.medium
@pytest.mark.parametrize("agreement", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("batch_size", [1, 8, 32])
@pytest.mark.parametrize("limit", [10, 60])
def test_bad_drafts_cost_little(qwen3, batch_size, limit, agreement):
    """Counted as a forward's fixed cost and its positions, at most a tenth more than plain greedy search."""
    rng = random.Random(0)
    task = Task(qwen3, batch_size, limit, [2])
    drafts = [
        [token if rng.random() < agreement else rng.choice([w for w in WORDS if w != token]) for token in one]
        for one in task.transcripts
    ]
    fixed = WEIGHTS_IN_POSITIONS["cpu"]

    def cost(drafts):
        with Watched(qwen3) as shapes:
            rows = task.check(qwen3, drafts)
        return sum(fixed + batch * positions for batch, positions in shapes), rows

    plain, _ = cost([[]] * batch_size)
    verified, rows = cost(drafts)
    assert verified <= 1.1 * plain
    assert sum(row.rejected for row in rows) > 0
    if agreement == 0.0 and batch_size > 1:  # it stops trying
        assert sum(row.rejected for row in rows) < 0.1 * (limit + fixed * limit / batch_size) * batch_size


def test_one_row_that_never_agrees_does_not_cost_more_either(qwen3):
    task = Task(qwen3, 8, 60, [2])
    drafts = [*task.transcripts[:7], [2] * 60]
    with Watched(qwen3) as shapes:
        task.check(qwen3, drafts)
    assert sum(60 + batch * positions for batch, positions in shapes) <= 1.1 * (
        60 * 60 + task.embeds[..., 0].numel() + 59 * 8
    )


@pytest.mark.oldest
@pytest.mark.parametrize("static", [False, True])
def test_kept_positions_move_to_the_right_end(qwen3, static):
    # The value at each place is its number; three rows of four positions.
    states = torch.arange(12.0).view(3, 1, 4, 1).expand(3, 2, 4, 8).clone()
    cache = StaticCache(config=qwen3.config, max_cache_len=6) if static else DynamicCache()
    for layer in range(2):
        cache.update(states, -states, layer)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 1, 0]])
    kept = keep_rows(cache, [0, 2], mask)
    assert kept.tolist() == [[1, 1], [1, 1]]
    assert cache.layers[1].keys[:, 0, :2, 0].tolist() == [[0, 1], [8, 10]]
    assert cache.layers[1].values[:, 1, :2, 7].tolist() == [[0, -1], [-8, -10]]
    assert int(cache.get_seq_length()) == 2
    assert keep_rows(cache, [0, 1], torch.tensor([[0, 1], [1, 1]])).tolist() == [[0, 1], [1, 1]]  # nothing to move
    assert keep_rows(cache, [0, 1], torch.tensor([[0, 1], [0, 1]])).tolist() == [[1], [1]]  # cut off on the left
    assert cache.layers[0].keys[:, 0, :1, 0].tolist() == [[1], [10]]


@pytest.mark.oldest
@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_memory_is_bounded(kind):
    """Between two forwards the cache holds no more than the longest prompt and what the longest row has decoded."""
    language_model = build(kind)
    task = Task(language_model, 6, 40, [2])
    rng = random.Random(3)
    longest = []
    hook = language_model.register_forward_pre_hook(
        lambda _, args, kwargs: longest.append(kwargs[CACHE].get_seq_length()), with_kwargs=True
    )
    task.check(language_model, [corrupt(one, "noisy", rng) for one in task.transcripts])
    hook.remove()
    assert 0 < max(longest) < task.embeds.shape[1] + 40


# Within `generate`.


@pytest.fixture
def stock(model, monkeypatch):
    """Record the calls of the language model's own `generate`."""
    calls, original = [], model.language_model.generate

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(model.language_model, "generate", spy)
    return calls


def configured(**fields):
    return GenerationConfig(max_new_tokens=5, pad_token_id=0, eos_token_id=2, **fields)


@pytest.mark.oldest
@pytest.mark.parametrize(
    "kwargs",
    [
        {"verify": False},
        {"do_sample": True},
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"repetition_penalty": 1.3},
        {"suppress_tokens": [5]},
        {"min_new_tokens": 3},
        {"no_repeat_ngram_size": 2},
        *[{"prompt_lookup_num_tokens": 2}] * (not LOOKUP),
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_scores": True},
        {"return_dict_in_generate": True, "output_logits": True},
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"max_time": 100.0},
        {"logits_processor": LogitsProcessorList()},
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(99)])},
        {"generation_config": configured(repetition_penalty=1.3)},
        {"generation_config": configured(of_a_later_version=True)},
    ],
    ids=" ".join,
)
def test_all_else_is_left_to_the_stock_loop(model, stock, processor, waveforms, kwargs):
    kwargs = {"max_new_tokens": 5, **kwargs} if "generation_config" not in kwargs else kwargs
    model.generate(**processor(audio=waveforms[0]), **kwargs)
    assert len(stock) == 1


@pytest.mark.oldest
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"max_new_tokens": 5, "first_token_guidance": False},
        {"max_length": 7},
        {"do_sample": False, "num_beams": 1, "temperature": 1.0, "logits_processor": None, "synced_gpus": False},
        {"eos_token_id": [2, 5]},
        {"cache_implementation": "static"},
        {"generation_config": configured()},
        {"generation_config": configured(repetition_penalty=1.0, do_sample=False, num_beams=1, use_cache=True)},
    ],
    ids=str,
)
def test_greedy_search_is_verified(model, stock, processor, waveforms, kwargs):
    inputs = processor(audio=waveforms)
    verified = model.generate(**inputs, **kwargs)
    assert not stock
    assert torch.equal(verified, model.generate(**inputs, **kwargs, verify=False))
    assert len(stock) == 1


@pytest.mark.oldest
def test_settings_of_the_language_model_count(build_model, processor, waveforms):
    """Where the model's generation config is silent, `generate` looks into the language model's."""
    model = build_model()
    inputs = processor(audio=waveforms)
    before = model.generate(**inputs)
    token = before[0, 3].item()
    model.language_model.generation_config.suppress_tokens = [token]
    assert not can_verify(model.language_model, model.generation_config, {})
    after = model.generate(**inputs)
    assert token not in after[0, 1:].tolist() and token in before[0, 1:].tolist()
    model.language_model.generation_config.suppress_tokens = None
    model.generation_config.eos_token_id = None
    model.language_model.generation_config.eos_token_id = token
    ended = model.generate(**inputs)
    assert torch.equal(ended, model.generate(**inputs, verify=False))
    assert ended[0].tolist()[3] == token and (ended[0, 4:] == model.generation_config.pad_token_id).all()


def test_language_models_that_prepare_their_own_inputs_are_left_alone(qwen3):
    config = Phi3Config(**SIZES)  # recomputes its cache beyond a length
    assert can_verify(qwen3, configured(), {})
    assert not can_verify(Phi3ForCausalLM(config), configured(), {})
    assert not can_verify(qwen3, GenerationConfig(), {})  # no number of tokens
    assert not can_verify(qwen3, configured(cache_implementation="quantized"), {})
    gemma2 = build("gemma2")
    assert can_verify(gemma2, configured(), {})
    assert not can_verify(gemma2, configured(cache_implementation="static"), {})


def test_weights_that_processes_share_are_left_alone():
    language_model = build("qwen3")
    language_model._is_fsdp_managed_module = True
    assert not can_verify(language_model, configured(), {})


def test_a_bridge_without_a_stage_1_has_no_draft(build_model, processor, waveforms):
    model = build_model(bridge="linear", bridge_config={"hidden_size": 16})
    output = model.generate(**processor(audio=waveforms[:2]), max_new_tokens=4, return_dict_in_generate=True)
    assert output.llm_forwards is None and output.accepted_tokens is None and output.rejected_tokens is None


def test_the_tokens_of_a_ctc_head_are_a_draft(build_model, processor, waveforms, stock):
    model = build_model(bridge="ctc")
    inputs = processor(audio=waveforms)
    output = model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True)
    assert output.llm_forwards is not None
    assert torch.equal(output.sequences, model.generate(**inputs, max_new_tokens=8, verify=False))


def test_what_is_reported(model, processor, waveforms):
    inputs = processor(audio=waveforms)
    output = model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True)
    assert output.llm_forwards.shape == output.accepted_tokens.shape == output.rejected_tokens.shape == (4,)
    for sequence, forwards, accepted in zip(output.sequences, output.llm_forwards, output.accepted_tokens, strict=True):
        decoded = (sequence != model.generation_config.pad_token_id).sum() - 1  # the guide was given
        assert decoded == forwards + accepted or decoded == accepted
    plain = model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True, verify=False)
    assert plain.llm_forwards is None and torch.equal(plain.sequences, output.sequences)
    alone = model.generate(**inputs, use_llm=False, return_dict_in_generate=True)
    assert alone.llm_forwards is None
    guide_only = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
    assert guide_only.llm_forwards.tolist() == [0] * 4


def test_rows_in_which_nothing_was_heard(model, processor, waveforms, monkeypatch):
    inputs = processor(audio=waveforms)
    original = model.align

    def align(*args, **kwargs):
        alignment = original(*args, **kwargs)
        alignment.mask[1] = 0
        return alignment

    monkeypatch.setattr(model, "align", align)
    output = model.generate(**inputs, return_dict_in_generate=True)
    assert output.llm_forwards[1] == output.accepted_tokens[1] == output.rejected_tokens[1] == 0
    assert (output.llm_forwards[[0, 2, 3]] > 0).all()
    assert torch.equal(output.sequences, model.generate(**inputs, verify=False))


@pytest.mark.oldest
@pytest.mark.parametrize("guided", [True, False])
def test_a_streamer_is_given_the_same_values(model, processor, waveforms, guided):
    def streamed(verify):
        values = []
        streamer = SimpleNamespace(put=lambda value: values.append(value.tolist()), end=lambda: values.append("end"))
        model.generate(**processor(audio=waveforms[0]), first_token_guidance=guided, streamer=streamer, verify=verify)
        return values

    assert streamed(True) == streamed(False)
    assert len(streamed(True)) > 3


def test_a_streamer_of_many_rows_is_left_to_the_stock_loop(model, stock, processor, waveforms):
    streamer = SimpleNamespace(put=lambda value: None, end=lambda: None)
    model.generate(**processor(audio=waveforms[:2]), streamer=streamer)
    assert len(stock) == 1


@pytest.mark.medium
@pytest.mark.oldest
@pytest.mark.parametrize("batch_size", [1, 10])
@pytest.mark.parametrize("guided", [True, False])
def test_the_shipped_checkpoint_writes_the_same_in_fewer_forwards(request, batch_size, guided):
    root = request.config.rootpath
    model = SeamForSpeechRecognition.from_pretrained(root / "checkpoints" / "tiny")
    processor = SeamProcessor.from_pretrained(root / "checkpoints" / "tiny")
    files = sorted((root / "checkpoints" / "recordings" / "audio").glob("*.wav"))
    forwards = tokens = 0
    for start in range(0, len(files), batch_size):
        inputs = processor(audio=[str(file) for file in files[start : start + batch_size]])
        output = model.generate(**inputs, first_token_guidance=guided, return_dict_in_generate=True)
        plain = model.generate(**inputs, first_token_guidance=guided, verify=False)
        assert torch.equal(output.sequences, plain)
        forwards += int(output.llm_forwards.sum())
        tokens += int((plain != model.generation_config.pad_token_id).sum()) - guided * len(plain)
    assert 0 < forwards < tokens / 2
