"""The aligner that begins as Whisper's decoder: its table, its prompt, and that decoder's own transcripts."""

import copy
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperForConditionalGeneration,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging

from seam.experiments import tiny_backbones
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.modeling_seam.nearest import alignment_distance
from seam.modeling_seam.pipeline import SeamPipeline
from seam.modeling_seam.token_table import WhisperPrompt, byte_strings, language_token, pieces, start_ids
from seam.tests.conftest import QWEN_SIZES, SENTENCES, WHISPER_SIZES
from seam.tests.helpers import qwen, whispers
from seam.tests.helpers.hub_cache import add_to_cache

pytestmark = pytest.mark.oldest

TEXT = "the old goat's hay in Zürich, 東京 costs 3.50 €\n"
SPECIAL = ["<unk>", "<s>", "</s>"]


# ---- vocabularies ----


def make_sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer as Llama (1 and 2), Gemma or newer conversions have it, with a token for every byte."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.train_from_iterator(
        [*SENTENCES, *whispers.TEXTS] * 20, trainers.BpeTrainer(vocab_size=140, show_progress=False)
    )
    trained = json.loads(bpe.to_str())["model"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *trained["vocab"]]
    merges = [tuple(pair) for pair in trained["merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    new = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "\u2581")
    strip = [decoders.Strip(" ", 1, 0)]
    if kind == "metaspace":
        new.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif kind == "gemma":
        new.normalizer, strip = replace, []
    else:
        new.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
    new.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=new, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.pad_token = "</s>"
    tokenizer.chat_template = "<s>{{ messages[0]['content'] }}</s>"
    return tokenizer


@pytest.fixture(scope="module", params=["byte-level", "qwen", "llama", "gemma", "metaspace"])
def tokenizer(request, backbones):
    if request.param == "byte-level":
        return AutoTokenizer.from_pretrained(backbones[1])
    if request.param == "qwen":
        if not qwen.RANKS.is_file():
            pytest.skip("no vocabulary of Qwen; `make test` fetches it")
        return qwen.load_tokenizer(qwen.load_ranks(qwen.RANKS))
    return make_sentencepiece(request.param)


def test_the_bytes_of_the_tokens_are_those_of_the_text(tokenizer):
    strings = byte_strings(tokenizer)
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert b"".join(strings[i] for i in ids).removeprefix(b" ") == TEXT.encode()
    assert not strings.keys() & {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    assert len(strings) >= len(tokenizer) - 30
    assert {bytes([byte]) for byte in range(256)} <= set(strings.values())


def test_other_vocabularies_are_refused():
    word_piece = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##s": 2}, unk_token="[UNK]"))
    word_piece.pre_tokenizer, word_piece.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    with pytest.raises(ValueError, match="of another kind; accepted: byte-level and SentencePiece"):
        byte_strings(PreTrainedTokenizerFast(tokenizer_object=word_piece, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="object has no tokenizer.json; accepted: a fast tokenizer"):
        byte_strings(object())


# ---- the table ----


@pytest.fixture(scope="module")
def whisper(multilingual):
    return WhisperForConditionalGeneration.from_pretrained(multilingual[0]).eval()


def spell(text: bytes, vocabulary: dict[bytes, int]) -> list[int]:
    """Spell with the longest piece first, written out once more."""
    if not text:
        return []
    for end in range(len(text), 0, -1):
        if text[:end] in vocabulary:
            return [vocabulary[text[:end]], *spell(text[end:], vocabulary)]
    return spell(text[1:], vocabulary)


def vocabulary_of(folder: str) -> dict[bytes, int]:
    """Bytes of the text tokens of a byte-level tokenizer, by transformers' own table of characters."""
    tokenizer, byte_of = AutoTokenizer.from_pretrained(folder), {c: b for b, c in bytes_to_unicode().items()}
    special = set(tokenizer.added_tokens_decoder)
    tokens = tokenizer.get_vocab().items()
    return {bytes(byte_of[c] for c in token): i for token, i in tokens if i not in special}


def test_rows_are_whispers_rows_of_the_same_bytes(table_model, multilingual, whisper):
    table, rows = table_model.bridge.token_table.weight, whisper.model.decoder.embed_tokens.weight
    own, known = vocabulary_of(multilingual[1]), vocabulary_of(multilingual[0])
    config = table_model.config
    same = [text for text in own if text in known]
    assert 256 <= len(same) < len(own)
    for text, i in own.items():
        if text in known:
            assert torch.equal(table[i], rows[known[text]])
        else:
            torch.testing.assert_close(table[i], rows[spell(text, known)].mean(0))
    ids = AutoTokenizer.from_pretrained(multilingual[0]).convert_tokens_to_ids
    assert torch.equal(table[config.eoa_token_id], rows[ids(whispers.END)])
    assert torch.equal(table[config.boa_token_id], rows[ids(whispers.WITHOUT_TIMES)])
    vocab_size = config.text_config.vocab_size
    assert torch.equal(table[vocab_size:], rows[ids(config.aligner_prompt_tokens)])
    others = set(range(vocab_size)) - set(own.values()) - {config.boa_token_id, config.eoa_token_id}
    assert others and not table[sorted(others)].any()


def test_layers_are_whispers(table_model, whisper):
    decoder = whisper.model.decoder.state_dict()
    for name, weight in table_model.bridge.state_dict().items():
        assert name == "token_table.weight" or torch.equal(weight, decoder[name]), name


@pytest.mark.parametrize(
    ("text", "expected"),
    [("abc", [3]), ("abd", [1, 4]), ("xab", [1]), ("aaxb", [0, 0, 2]), ("", []), ("x", [])],
)
def test_pieces_are_the_longest_from_the_left(text, expected):
    assert pieces(text.encode(), {b"a": 0, b"ab": 1, b"b": 2, b"abc": 3, b"d": 4}) == expected


def test_bytes_and_characters_of_sentencepiece(multilingual, tmp_path):
    """A byte has its character's row, but is not decoded where there is a token of that character."""
    tokenizer = make_sentencepiece("llama")
    torch.manual_seed(3)
    model = tiny_backbones.make_qwen3(tokenizer, **QWEN_SIZES)
    llm = tiny_backbones.save_backbone(tmp_path, model, tokenizer)
    processor = SeamProcessor.from_backbones(
        multilingual[0], llm, boa_token="<s>", eoa_token="</s>", leading_space=True
    )
    seam = SeamForSpeechRecognition.from_backbones(multilingual[0], llm, processor, token_projection="table")
    table, (a, byte, euro) = seam.bridge.token_table.weight, tokenizer.convert_tokens_to_ids(["a", "<0x61>", "<0xE2>"])
    assert torch.equal(table[a], table[byte]) and table[a].any() and table[euro].any()
    returnable = set(seam.lookup.returnable.tolist())
    assert a in returnable and euro in returnable and byte not in returnable
    the = processor.transcript_ids("the old goat")
    assert tokenizer.convert_ids_to_tokens(the)[0] == "\u2581the" and processor.decode(the) == "the old goat"
    assert returnable >= set(processor.transcript_ids(TEXT))
    assert processor.decode(processor.transcript_ids(TEXT)) == TEXT.strip()


@pytest.mark.parametrize("kind", ["llama", "gemma", "metaspace"])
def test_transcripts_begin_within_a_sentence(multilingual, kind):
    tokenizer = make_sentencepiece(kind)
    extractor = tiny_backbones.WhisperFeatureExtractor()
    processor = SeamProcessor(extractor, tokenizer, boa_token="<s>", eoa_token="</s>", leading_space=True)
    ids = processor.transcript_ids("the old goat")
    within = tokenizer("stop the old goat", add_special_tokens=False).input_ids
    assert ids == within[-len(ids) :] and tokenizer.convert_ids_to_tokens(ids[0]).startswith("\u2581t")
    assert processor.decode(ids) == "the old goat"


# ---- Whisper's prompt ----


def ids_of(model, *names: str) -> list[int]:
    first = model.config.text_config.vocab_size
    return [first + model.config.aligner_prompt_tokens.index(f"<|{name}|>") for name in names]


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({}, ["startoftranscript", "en", "transcribe"]),
        ({"language": "de"}, ["startoftranscript", "de", "transcribe"]),
        ({"language": "German", "task": "translate"}, ["startoftranscript", "de", "translate"]),
        ({"language": "<|fr|>"}, ["startoftranscript", "fr", "transcribe"]),
        ({"task": "translate"}, ["startoftranscript", "en", "translate"]),
    ],
)
def test_the_prompt_precedes_boa(table_model, asked, names):
    assert start_ids(table_model.config, **asked) == [*ids_of(table_model, *names), table_model.config.boa_token_id]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"language": "klingon"}, "language is 'klingon'; accepted: de, en, fr."),
        ({"language": "it"}, "language is 'it'; accepted: de, en, fr."),
        ({"task": "sing"}, "task is 'sing'; accepted: transcribe, translate."),
    ],
)
def test_unknown_languages_and_tasks_are_named(table_model, processor, waveforms, asked, message):
    with pytest.raises(ValueError, match=message):
        table_model.generate(**processor(audio=waveforms[0]), **asked)


def test_projections_are_told_no_language_but_transcribe(model, processor, waveforms, caplog):
    inputs = processor(audio=waveforms[0])
    plain = model.generate(**inputs)
    logging.warning_once.cache_clear()
    assert torch.equal(model.generate(**inputs, language="de", task="transcribe"), plain)
    assert "language is 'de', without effect" in caplog.text
    for task in ("translate", "sing"):
        with pytest.raises(ValueError, match=f"task is '{task}'; accepted: transcribe."):
            model.generate(**inputs, task=task)


def test_an_english_whisper_hears_english(table_model):
    config = copy.copy(table_model.config)
    config.aligner_prompt_tokens, config.aligner_prompt = ["<|startoftranscript|>"], ["<|startoftranscript|>"]
    assert start_ids(config, "English", "transcribe") == start_ids(config, "en") == start_ids(config)
    with pytest.raises(ValueError, match="language is 'de'; accepted: en."):
        start_ids(config, "de")
    with pytest.raises(ValueError, match="task is 'translate'; accepted: transcribe."):
        start_ids(config, task="translate")


def test_projections_are_built_without_a_language(backbones, processor):
    with pytest.raises(ValueError, match="language is for token_projection='table'"):
        SeamForSpeechRecognition.from_backbones(*backbones, processor, language="de")


def settings_of(**fields) -> GenerationConfig:
    settings = GenerationConfig(decoder_start_token_id=7, eos_token_id=8)
    for name, value in fields.items():
        setattr(settings, name, value)
    return settings


def test_prompts_of_all_kinds_of_whisper():
    bare = WhisperPrompt.of(settings_of(), None)
    assert (bare.default, bare.end_id) == (["<|startoftranscript|>"], 8)
    english = settings_of(no_timestamps_token_id=5)
    assert WhisperPrompt.of(english, None).default == ["<|startoftranscript|>", "<|notimestamps|>"]
    assert WhisperPrompt.of(english, "English") == WhisperPrompt.of(english, "en") == WhisperPrompt.of(english, None)
    with pytest.raises(ValueError, match="language is 'de'; accepted: en."):
        WhisperPrompt.of(english, "de")
    fields = {"lang_to_id": {"<|de|>": 1, "<|fr|>": 2}, "task_to_id": {"transcribe": 3}, "no_timestamps_token_id": 5}
    german = WhisperPrompt.of(settings_of(**fields), None)
    assert german.default == ["<|startoftranscript|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    assert german.ids == {
        "<|startoftranscript|>": 7,
        **{"<|de|>": 1, "<|fr|>": 2, "<|transcribe|>": 3, "<|notimestamps|>": 5},
    }
    assert WhisperPrompt.of(settings_of(**fields), "French").default[1] == "<|fr|>"
    assert WhisperPrompt.of(settings_of(eos_token_id=[8, 9]), None).end_id == 8


def test_names_of_languages():
    assert language_token("Burmese", ["<|my|>"]) == language_token("MY", ["<|my|>"]) == "<|my|>"


def test_a_language_changes_what_is_decoded(table_model, build_table_model, processor, waveforms):
    batch = processor(audio=waveforms)
    german = build_table_model(language="de")
    assert german.config.aligner_prompt == ["<|startoftranscript|>", "<|de|>", "<|transcribe|>"]
    for use_llm in (True, False):
        asked = table_model.generate(**batch, language="de", use_llm=use_llm)
        assert torch.equal(german.generate(**batch, use_llm=use_llm), asked)
        assert torch.equal(
            german.generate(**batch, language="en", use_llm=use_llm), table_model.generate(**batch, use_llm=use_llm)
        )
    assert not torch.equal(asked, table_model.generate(**batch, use_llm=False))


def test_a_language_is_that_of_all_loops(build_table_model, processor, waveforms):
    """The plain loop, the draft's verification, the stock loop, and the pass that embeds Stage 1's tokens."""
    model = build_table_model(draft_vocabulary=list(range(3, 250)), llm_inputs="continuous")
    states, mask = model.encode(**processor(audio=waveforms))
    asked = {"language": "fr", "task": "translate", "return_distances": True}
    plain, drafted, stock = (
        model.align(states, mask, **asked, **options)
        for options in ({"verify": False}, {}, {"output_scores": True, "verify": False})
    )
    assert drafted.forwards is not None and stock.scores is not None
    for other in (drafted, stock):
        assert torch.equal(other.sequences, plain.sequences)
        torch.testing.assert_close(other.aligned_embeds, plain.aligned_embeds, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(other.distances, plain.distances, rtol=1e-3, atol=1e-4)
    expected = model.generate(speech_states=states, speech_mask=mask, language="fr", task="translate")
    beams = {"num_beams": 1, "do_sample": False, "cache_implementation": "static"}
    assert torch.equal(
        model.generate(speech_states=states, speech_mask=mask, language="fr", task="translate", **beams), expected
    )


def test_a_pipeline_takes_a_language(table_model, processor, waveforms):
    asr = SeamPipeline(model=table_model, processor=processor, task="automatic-speech-recognition")
    german, english = (
        asr(waveforms[2], generate_kwargs={"language": language, "use_llm": False}) for language in ("de", "en")
    )
    expected = table_model.generate(**processor(audio=waveforms[2]), language="de", use_llm=False)
    assert german["text"] == processor.batch_decode(expected)[0].strip() != english["text"]
    with pytest.raises(ValueError, match="accepted: de, en, fr"):
        asr(waveforms[0], language="it")


# ---- Whisper's own transcripts ----


@pytest.fixture(scope="module")
def same_vocabulary(tmp_path_factory):
    """Folders of a multilingual Whisper and of a language model that has its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("same"), whispers.make_tokenizer()
    whisper = whispers.save_whisper(folder / "whisper", tokenizer, 2, seed=4, **WHISPER_SIZES)
    language_model = tiny_backbones.make_qwen3(tokenizer, **QWEN_SIZES)
    return whisper, tiny_backbones.save_backbone(folder / "llm", language_model, tokenizer)


@pytest.mark.parametrize("asked", [{}, {"language": "de"}, {"language": "fr", "task": "translate"}])
@pytest.mark.parametrize("fast", [True, False])
def test_with_whispers_vocabulary_it_decodes_what_whisper_decodes(same_vocabulary, waveforms, asked, fast):
    """Greedy, in the full window, with no mixture: Stage 1 *is* Whisper's decoder."""
    whisper = WhisperForConditionalGeneration.from_pretrained(same_vocabulary[0]).eval()
    processor = SeamProcessor.from_backbones(
        *same_vocabulary, boa_token=whispers.START, eoa_token=whispers.END, leading_space=True
    )
    model = SeamForSpeechRecognition.from_backbones(
        *same_vocabulary, processor, token_projection="table", mixture_size=1, mask_speech_padding=False
    ).eval()
    inputs = processor(audio=waveforms)
    limit = model.config.max_alignment_tokens
    expected = whisper.generate(
        inputs.input_features,
        **{"language": "en", "task": "transcribe", **asked},
        max_new_tokens=limit,
        suppress_tokens=model.config.lookup_excluded_ids,  # special tokens, which Stage 1 does not return
    )
    options = {} if fast else {"output_scores": True}
    alignment = model.align(*model.encode(**inputs), **asked, **options)
    end, found = model.config.eoa_token_id, []
    for row in expected.tolist():
        row = [i for i in row if i == end or i not in model.config.lookup_excluded_ids]  # without Whisper's prompt
        found.append(row[: row.index(end)] if end in row else row)
    decoded = [row[keep.bool()].tolist() for row, keep in zip(alignment.sequences, alignment.mask, strict=True)]
    assert decoded == found
    assert len({i for row in found for i in row}) > 5 and len(set(map(tuple, found))) > 2


# ---- predictions ----


def predictions(model, waveforms, processor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predicted embeddings, `(n, d_llm)`, and the scores of the tokens that can be returned."""
    states, mask = model.encode(**processor(audio=waveforms))
    torch.manual_seed(0)
    with torch.no_grad():
        output = model._teacher_forced(states, mask, torch.randint(3, 300, (4, 15)), return_token_logits=True)
    return output.aligned_embeds.flatten(0, 1), output.token_logits.flatten(0, 1)


@pytest.mark.parametrize("size", [2, 8, 10**6])
def test_a_prediction_is_a_mixture_of_the_best_tokens(build_table_model, processor, waveforms, size):
    model = build_table_model(mixture_size=size)
    embeds, scores = predictions(model, waveforms, processor)
    ids, table = model.lookup.returnable, model.get_input_embeddings().weight
    assert scores.shape == (64, len(ids))
    for one, score in zip(embeds, scores, strict=True):
        best = score.argsort(descending=True)[:size]
        shares = score[best].double().softmax(-1)
        assert len(best) == min(size, len(ids))
        torch.testing.assert_close(one, (shares @ table[ids[best]].double()).float(), rtol=1e-4, atol=1e-5)


def test_a_mixture_of_one_is_its_embedding(build_table_model, processor, waveforms):
    model = build_table_model(mixture_size=1)
    embeds, scores = predictions(model, waveforms, processor)
    best = model.lookup.returnable[scores.argmax(-1)]
    assert torch.equal(embeds, model.get_input_embeddings().weight[best])
    assert torch.equal(model.lookup.nearest(embeds), best) and len(best.unique()) > 5


def test_only_tokens_that_can_be_returned_are_in_a_mixture(table_model, build_table_model, processor, waveforms):
    states = table_model.encode(**processor(audio=waveforms))
    decoded = table_model.align(*states).sequences.unique().tolist()
    eoa, vocab_size = table_model.config.eoa_token_id, table_model.config.text_config.vocab_size
    for fields, accepted in (
        ({"active_vocabulary": decoded[::2]}, {*decoded[::2], eoa}),
        ({"lookup_excluded_ids": decoded[::2]}, set(range(vocab_size)) - set(decoded[::2])),
    ):
        model = build_table_model(**fields)
        assert set(model.lookup.returnable.tolist()) == accepted
        alignment = model.align(*states, return_distances=True)
        assert set(alignment.sequences[alignment.mask.bool()].tolist()) <= accepted
        rows = model.get_input_embeddings().weight[sorted(accepted)]
        for one in alignment.aligned_embeds[alignment.mask.bool()]:  # no corner of the hull is passed in any direction
            assert (one @ rows.T <= (rows @ rows.T).amax(0) + 1e-4).all()


def test_the_rows_follow_the_table_and_the_choice_of_ids(build_table_model, processor, waveforms):
    """They are kept while nothing changes, and no longer."""
    model = build_table_model()
    rows = model.bridge._returnable_rows
    with torch.no_grad():
        kept = rows(model.lookup)
        assert rows(model.lookup) is kept
        model.bridge.token_table.weight[7] += 1
        assert not torch.equal(rows(model.lookup), kept)
        model.config.active_vocabulary, model._lookup = [5, 6, 7], None
        assert torch.equal(rows(model.lookup), model.bridge.token_table.weight[model.lookup.returnable])
        assert rows(model.to(torch.bfloat16).lookup).dtype == torch.bfloat16
        held = rows(model.lookup)
        assert rows(model.lookup) is held
        model.train()
        assert rows(model.lookup) is not held
    assert rows(model.lookup).requires_grad


@pytest.mark.parametrize("ids", [[0], [5, 300, 7], list(range(315))])
def test_indices_of_returnable_ids(build_table_model, ids):
    for model in (build_table_model(), build_table_model(active_vocabulary=[300, 7, 19])):
        returnable = model.lookup.returnable.tolist()
        expected = [returnable.index(i) if i in returnable else -1 for i in ids]
        assert model.lookup.index_of(torch.tensor([ids])).tolist() == [expected]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2, "cache_implementation": "static"},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 4},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
)
def test_other_searches_begin_with_the_prompt_too(table_model, processor, waveforms, options):
    """Every token is predicted after the prompt: distances are those of the pass over the tokens found."""
    states, mask = table_model.encode(**processor(audio=waveforms))
    torch.manual_seed(1)
    found = table_model.align(states, mask, language="de", return_distances=True, max_new_tokens=7, **options)
    copies = options.get("num_return_sequences", 1)
    assert found.sequences.shape[0] == 4 * copies and 1 < found.sequences.shape[1] <= 7
    assert found.sequences.max() < table_model.config.text_config.vocab_size
    predicted = table_model.teacher_forced(
        states.repeat_interleave(copies, 0),
        mask.repeat_interleave(copies, 0),
        found.sequences,
        start_ids(table_model.config, "de"),
    )[:, :-1]
    keep = found.mask.bool()
    torch.testing.assert_close(found.aligned_embeds[keep], predicted[keep], rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    other = table_model.align(states, mask, language="fr", max_new_tokens=7, **options)
    assert not torch.equal(other.sequences, found.sequences)


def test_scores_are_those_of_the_vocabulary(table_model, processor, waveforms):
    output = table_model.generate(
        **processor(audio=waveforms),
        **{"use_llm": False, "num_beams": 2, "max_new_tokens": 5},
        **{"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    )
    vocab_size = table_model.config.text_config.vocab_size
    assert {step.shape for step in (*output.scores, *output.logits)} == {(8, vocab_size)}
    assert table_model.config.aligner_config.vocab_size == len(whispers.make_tokenizer())  # as it was
    scores = table_model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    assert scores.shape == output.sequences.shape and torch.isfinite(scores).all()


def test_outputs_on_request_begin_at_boa(build_table_model, processor, waveforms):
    model = build_table_model()
    model.set_attn_implementation("eager")
    inputs = processor(audio=waveforms, text=SENTENCES)
    tokens, before = inputs["labels"].shape[1], len(model.config.aligner_prompt)
    output = model(**inputs, use_llm=False, output_hidden_states=True, output_attentions=True)
    assert output.aligned_embeds.shape == (4, tokens, 48)
    assert [states.shape for states in output.hidden_states] == [(4, tokens, 32)] * 3
    assert [weights.shape for weights in output.attentions] == [(4, 4, tokens, before + tokens)] * 2
    assert [weights.shape[:3] for weights in output.cross_attentions] == [(4, 4, tokens)] * 2
    # The last token attends to all before it, the prompt included; the first to none after it.
    assert output.attentions[0][..., -1, :].all() and not output.attentions[0][..., 0, before + 1 :].any()
    again, _ = model.bridge.predict(output.hidden_states[-1], model.lookup)
    torch.testing.assert_close(again, output.aligned_embeds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(build_table_model, processor, waveforms, dtype):
    model = build_table_model().to(dtype)
    inputs = processor(audio=waveforms)
    output = model.generate(
        **{**inputs, "input_features": inputs.input_features.to(dtype)}, return_dict_in_generate=True
    )
    assert output.aligned_embeds.dtype == dtype and torch.isfinite(output.alignment_distances).all()
    assert output.alignment_sequences.shape == output.alignment_mask.shape == output.alignment_distances.shape


# ---- the loss of Stage 1 ----


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_loss_is_eq_3_and_a_cross_entropy(build_table_model, processor, waveforms, weight):
    """By hand, one token after another. A token that cannot be returned has a distance, but no cross-entropy."""
    excluded = processor.transcript_ids(SENTENCES[0])[1]
    model = build_table_model(alignment_reduction="mean")
    model.config.lookup_excluded_ids, model._lookup = [*model.config.lookup_excluded_ids, excluded], None
    inputs = processor(audio=waveforms, text=SENTENCES)
    states, mask = model.encode(inputs.input_features, inputs.attention_mask)
    table, rows = model.get_input_embeddings().weight, model.bridge.token_table.weight
    returnable, norm = model.lookup.returnable.tolist(), model.bridge.layer_norm
    assert excluded not in returnable
    total = count = left_out = 0
    for i, text in enumerate(SENTENCES):
        ids = processor.transcript_ids(text)
        hidden = model._teacher_forced(
            states[i : i + 1], mask[i : i + 1], torch.tensor([ids]), output_hidden_states=True
        ).hidden_states[-1][0]
        predicted = model.teacher_forced(states[i : i + 1], mask[i : i + 1], torch.tensor([ids]))[0]
        for one, state, target in zip(predicted, norm(hidden), [*ids, model.config.eoa_token_id], strict=True):
            total = total + alignment_distance(one, table[target], 0.5, "mean")
            if target in returnable:
                logits = rows[returnable] @ state
                total = total + weight * (logits.logsumexp(-1) - rows[target] @ state)
            else:
                left_out += 1
            count += 1
    assert left_out == 1
    loss = model(**inputs, use_llm=False, cross_entropy_weight=weight).loss
    torch.testing.assert_close(loss, total / count, rtol=1e-4, atol=1e-5)
    halved = model(**inputs, use_llm=False, cross_entropy_weight=weight, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(halved, loss / 2)


def test_other_inputs_than_the_labels_are_read(table_model, processor, waveforms):
    inputs = processor(audio=waveforms, text=SENTENCES)
    own = inputs["labels"][:, :-1]
    plain = table_model(**inputs, use_llm=False)
    assert torch.equal(table_model(**inputs, use_llm=False, alignment_inputs=own).loss, plain.loss)
    changed = own.clone()
    changed[:, 2] = 9
    other = table_model(**inputs, use_llm=False, alignment_inputs=changed)
    torch.testing.assert_close(other.aligned_embeds[:, :3], plain.aligned_embeds[:, :3])
    assert not torch.equal(other.aligned_embeds[:, 3], plain.aligned_embeds[:, 3])
    assert other.loss != plain.loss


def test_projections_have_no_scores(model, processor, waveforms):
    with pytest.raises(ValueError, match="cross_entropy_weight: linear projections have no scores; accepted: 0"):
        model(**processor(audio=waveforms, text=SENTENCES), use_llm=False, cross_entropy_weight=0.5)


# ---- building, saving and loading ----


def load(folder, **options) -> SeamForSpeechRecognition:
    return SeamForSpeechRecognition.from_pretrained(folder, **options)


def test_reload_equals_original(table_model, processor, waveforms, tmp_path):
    table_model.save_pretrained(tmp_path)
    again = load(tmp_path)
    for name in ("token_projection", "mixture_size", "aligner_prompt", "aligner_prompt_tokens", "speech_margin"):
        assert getattr(again.config, name) == getattr(table_model.config, name)
    for name, weight in table_model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    batch = processor(audio=waveforms)
    assert torch.equal(again.generate(**batch, language="de"), table_model.generate(**batch, language="de"))


@pytest.fixture
def from_hub(multilingual, processor, tmp_path, monkeypatch) -> SeamForSpeechRecognition:
    cache = tmp_path / "cache"
    for name, folder, commit in zip(("whisper", "llm"), multilingual, ("a" * 40, "b" * 40), strict=True):
        add_to_cache(cache, f"owner/{name}", Path(folder), commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return SeamForSpeechRecognition.from_backbones(
        "owner/whisper", "owner/llm", processor, token_projection="table", lora_rank=4, language="de"
    ).eval()


@pytest.mark.parametrize("alignment_only", [False, True])
def test_a_light_checkpoint_makes_its_table_again(from_hub, processor, tmp_path, alignment_only):
    model = from_hub
    if alignment_only:
        model = SeamForSpeechRecognition.from_backbones(
            *("owner/whisper", "owner/llm", processor), token_projection="table", language="de", alignment_only=True
        )
    model.save_pretrained(tmp_path / "light", light=True)
    names = load_file(tmp_path / "light" / "model.safetensors").keys()
    assert "bridge.layer_norm.weight" in names and "bridge.token_table.weight" not in names
    again = load(tmp_path / "light")
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    again.save_pretrained(tmp_path / "again", light=True)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("light", "again"))
    assert one == other
    assert again.config.aligner_prompt == ["<|startoftranscript|>", "<|de|>", "<|transcribe|>"]


def test_a_trained_table_is_part_of_a_light_checkpoint(from_hub, tmp_path):
    with torch.no_grad():
        from_hub.bridge.token_table.weight[9] += 1
    from_hub.config.token_table_trained = True
    from_hub.save_pretrained(tmp_path / "light", light=True)
    assert "bridge.token_table.weight" in load_file(tmp_path / "light" / "model.safetensors")
    again = load(tmp_path / "light")
    assert torch.equal(again.bridge.token_table.weight, from_hub.bridge.token_table.weight)


def test_light_in_half_precision(from_hub, tmp_path):
    from_hub.save_pretrained(tmp_path / "light", light=True)
    from_hub.save_pretrained(tmp_path / "full")
    half, full = (load(tmp_path / name, dtype=torch.bfloat16).bridge.token_table.weight for name in ("light", "full"))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, full, rtol=0.02, atol=0.02)


def test_an_encoder_without_a_decoder_is_refused(multilingual, processor, tmp_path):
    shutil.copytree(multilingual[0], tmp_path, dirs_exist_ok=True)
    weights = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "decoder.embed_tokens" not in k}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="embed_tokens"):
        SeamForSpeechRecognition.from_backbones(str(tmp_path), multilingual[1], processor, token_projection="table")


def test_what_does_not_go_with_a_table_is_refused(multilingual, processor):
    for fields, message in (
        ({"bridge": "linear"}, "token_projection is 'table', but the bridge 'linear' has no table"),
        ({"aligner_config": {**WHISPER_SIZES, "decoder_layers": 1}}, "decoder_layers 1"),
        ({"language": "it"}, "language is 'it'; accepted: de, en, fr."),
    ):
        with pytest.raises(Exception, match=message):
            SeamForSpeechRecognition.from_backbones(*multilingual, processor, token_projection="table", **fields)
