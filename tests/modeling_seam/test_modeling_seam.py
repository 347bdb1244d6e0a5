"""Composition, the training forward, saving and loading."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    BitsAndBytesConfig,
    Qwen3ForCausalLM,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.modeling_seam.nearest import alignment_distance

pytestmark = pytest.mark.oldest


@pytest.fixture(scope="module")
def batch(processor, waveforms):
    return processor(audio=waveforms)


TEXTS = ["one two three", "turn on the light in the kitchen", "stop", "the old goat"]


def test_backbones_are_really_loaded(model, backbones):
    for own, original in (
        (model.encoder, WhisperModel.from_pretrained(backbones[0]).encoder),
        (model.language_model, Qwen3ForCausalLM.from_pretrained(backbones[1])),
    ):
        weights = {name.replace("base_layer.", ""): value for name, value in own.state_dict().items()}
        for name, value in original.state_dict().items():
            assert torch.equal(weights[name], value), name


def test_a_backbone_that_lacks_weights_is_refused(backbones, processor, tmp_path):
    shutil.copytree(backbones[0], tmp_path / "whisper")
    weights = load_file(tmp_path / "whisper" / "model.safetensors")
    del weights["model.encoder.layers.1.fc1.weight"]
    save_file(weights, tmp_path / "whisper" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of the weights .*encoder.layers.1.fc1.weight"):
        SeamForSpeechRecognition.from_backbones(str(tmp_path / "whisper"), backbones[1], processor)


def own_decoder(backbones) -> dict[str, torch.Tensor]:
    """Weights of the Whisper's decoder that an aligner has as well."""
    weights = WhisperForConditionalGeneration.from_pretrained(backbones[0]).model.decoder.state_dict()
    del weights["embed_tokens.weight"]
    return weights


def test_the_aligner_can_begin_as_whispers_own_decoder(build_model, backbones):
    fresh, begun = (build_model(aligner_from_decoder=is_on).bridge.state_dict() for is_on in (False, True))
    whisper = own_decoder(backbones)
    assert set(begun) - set(whisper) == {"input_projection.weight", "output_projection.weight"}
    for name, weight in begun.items():
        assert torch.equal(weight, whisper.get(name, fresh[name])), name
    assert not torch.equal(fresh["layers.0.fc1.weight"], whisper["layers.0.fc1.weight"])
    assert build_model(aligner_from_decoder=True, alignment_only=True).config.to_dict() == (
        build_model(alignment_only=True).config.to_dict()
    )


@pytest.mark.parametrize("name", ["layers.1.fc1.weight", "embed_positions.weight", "layer_norm.bias"])
def test_a_decoder_that_lacks_weights_is_no_beginning(backbones, processor, tmp_path, name):
    shutil.copytree(backbones[0], tmp_path / "whisper")
    weights = load_file(tmp_path / "whisper" / "model.safetensors")
    del weights[f"model.decoder.{name}"]
    save_file(weights, tmp_path / "whisper" / "model.safetensors", metadata={"format": "pt"})
    names = (str(tmp_path / "whisper"), backbones[1], processor)
    with pytest.raises(ValueError, match=f"lacks 1 of the weights .*decoder.{name}"):
        SeamForSpeechRecognition.from_backbones(*names, aligner_from_decoder=True)
    SeamForSpeechRecognition.from_backbones(*names)  # the decoder is not read


@pytest.mark.parametrize(
    "size",
    [
        {"decoder_layers": 1},
        {"decoder_ffn_dim": 96},
        {"max_target_positions": 30},
        {"decoder_attention_heads": 2},
    ],
)
def test_a_decoder_of_other_sizes_is_no_beginning(backbones, processor, size):
    aligner = {**WhisperModel.from_pretrained(backbones[0]).config.to_dict(), **size}
    ((name, value),) = size.items()
    own = "decoder_layers 2, d_model 32, decoder_ffn_dim 64, decoder_attention_heads 4, max_target_positions 24"
    with pytest.raises(ValueError, match=f"aligner_config has .*{name} {value}.*; accepted: .* decoder, {own}"):
        SeamForSpeechRecognition.from_backbones(
            *backbones, processor, aligner_from_decoder=True, aligner_config=aligner
        )


def test_a_baseline_cannot_begin_as_a_decoder(backbones, processor):
    with pytest.raises(ValueError, match="the bridge 'ctc' is no Whisper decoder; accepted: aligner"):
        SeamForSpeechRecognition.from_backbones(*backbones, processor, aligner_from_decoder=True, bridge="ctc")


def test_eoa_with_a_twin_is_warned_about(build_model, caplog):
    model = build_model()
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table[100] = table[model.config.eoa_token_id] + 1e-4
    with caplog.at_level("WARNING", logger="transformers"):
        import transformers

        transformers.utils.logging.enable_propagation()
        model.warn_if_eoa_is_ambiguous()
        transformers.utils.logging.disable_propagation()
    assert "nearly the same embedding as id 100" in caplog.text


def test_stage1_loss_is_eq_3(model, processor, batch):
    labels = processor(text=TEXTS)["labels"]
    states, mask = model.encode(**batch)
    total = count = 0
    for i, text in enumerate(TEXTS):
        ids = torch.tensor([*processor.transcript_ids(text), processor.eoa_token_id])
        predicted = model.teacher_forced(states[i : i + 1], mask[i : i + 1], ids[None, :-1])[0]
        target = model.get_input_embeddings()(ids)
        total += alignment_distance(predicted, target, 0.5, "sum").sum()
        count += len(ids)
    loss = model(**batch, labels=labels, use_llm=False).loss
    torch.testing.assert_close(loss, total / count, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model(**batch, labels=labels, use_llm=False, num_items_in_batch=10 * count).loss, loss / 10
    )


@pytest.mark.parametrize("llm_inputs", ["nearest", "continuous"])
def test_stage2_loss_is_eq_4_row_by_row(build_model, processor, batch, llm_inputs):
    """Each row alone, without padding, with the prompt ids that inference uses."""
    model = build_model(llm_inputs=llm_inputs)
    end = processor.end_of_turn_id
    states, mask = model.encode(**batch)
    embed, prompt = model.get_input_embeddings(), processor.prompt_ids()
    place = prompt.index(processor.audio_token_id)
    total = count = 0
    for i, text in enumerate(TEXTS):
        ids = torch.tensor(processor.transcript_ids(text))
        aligned = model.teacher_forced(states[i : i + 1], mask[i : i + 1], ids[None])[0, :-1]
        if llm_inputs == "nearest":
            aligned = embed(model.lookup.distances(aligned).argmin(-1))
        reply = torch.cat([ids, torch.tensor([end])])
        embeds = torch.cat(
            [embed(torch.tensor(prompt[:place])), aligned, embed(torch.tensor(prompt[place + 1 :])), embed(ids)]
        )
        logits = model.language_model(inputs_embeds=embeds[None]).logits[0, -len(reply) :]
        total += torch.nn.functional.cross_entropy(logits, reply, reduction="sum")
        count += len(reply)
    loss = model(**batch, labels=processor(text=TEXTS)["labels"]).loss
    torch.testing.assert_close(loss, total / count, rtol=1e-4, atol=1e-4)


def test_a_given_first_token_is_read_but_not_learned(model, processor, batch):
    """Each row alone and by hand: another first token than the transcript's in the input, the loss from y_2 on."""
    transcripts = [processor.transcript_ids(text) for text in TEXTS]
    transcripts[2] = []  # nothing but an end to learn: there is no first token to give
    given = torch.tensor([7, 300, 11, processor.transcript_ids("stop")[0]])
    labels = processor.labels(transcripts)
    embed, prompt = model.get_input_embeddings(), torch.tensor(processor.prompt_ids())
    place = int((prompt == processor.audio_token_id).nonzero())
    aligned = embed(torch.arange(20, 40).view(4, 5))
    total = count = 0
    for i, transcript in enumerate(transcripts):
        ids = torch.tensor(transcript, dtype=torch.long)
        reply = torch.cat([ids, torch.tensor([processor.end_of_turn_id])])
        begun = torch.cat([given[i : i + 1], ids[1:]]) if len(ids) else ids
        embeds = torch.cat([embed(prompt[:place]), aligned[i], embed(prompt[place + 1 :]), embed(begun)])
        logits = model.language_model(inputs_embeds=embeds[None]).logits[0, -len(reply) :]
        learned = slice(1 if len(ids) else 0, None)
        row = torch.nn.functional.cross_entropy(logits[learned], reply[learned], reduction="sum")
        alone = {"labels": labels[i : i + 1], "aligned_embeds": aligned[i : i + 1]}
        torch.testing.assert_close(
            model(**alone, first_token_ids=given[i : i + 1]).loss, row / len(reply), rtol=1e-4, atol=1e-4
        )
        total, count = total + row, count + len(reply)  # the count is the one without a given token
    inputs = {"labels": labels, "aligned_embeds": aligned}
    torch.testing.assert_close(model(**inputs, first_token_ids=given).loss, total / count, rtol=1e-4, atol=1e-4)
    assert not torch.isclose(model(**inputs).loss, total / count, rtol=1e-2)
    with pytest.raises(ValueError, match="first_token_ids: the bridge .* has no Stage 1|first_token_ids guide the LLM"):
        model(**batch, labels=labels, first_token_ids=given, use_llm=False)


def test_the_training_prompt_is_the_inference_prompt(model, processor, batch, monkeypatch):
    """Ids in, ids out: both calls hand the language model the same embeddings up to the reply."""
    seen = []
    original = type(model.language_model).forward

    def spy(self, *args, **kwargs):
        seen.append((kwargs["inputs_embeds"], kwargs.get("attention_mask")))
        return original(self, *args, **kwargs)

    heard = model.generate(**batch, return_dict_in_generate=True, use_llm=False)
    texts = processor.batch_decode(heard.sequences[:1])
    one = {key: value[:1] for key, value in batch.items()}
    monkeypatch.setattr(type(model.language_model), "forward", spy)
    model.generate(**one, first_token_guidance=False, max_new_tokens=1)
    aligned = model.embed_alignment(heard.alignment_sequences[:1])
    labels = processor(text=["stop"])["labels"]
    model(labels=labels, aligned_embeds=aligned)
    (at_inference, _), (in_training, _) = seen
    length = at_inference.shape[1]
    assert texts and torch.equal(at_inference, in_training[:, :length])
    reply = model.get_input_embeddings()(labels[:, :-1])
    torch.testing.assert_close(in_training[:, length:], reply)


def test_hidden_states_and_attentions_on_request(build_model, processor, batch):
    model = build_model()
    model.set_attn_implementation("eager")  # the one that has weights to show
    inputs = {**batch, "labels": processor(text=TEXTS)["labels"]}
    tokens = inputs["labels"].shape[1]
    lengths = model.encode(**batch)[1].sum(-1)
    stage1 = model(**inputs, use_llm=False, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in stage1.hidden_states] == [(4, tokens, 32)] * 3
    assert [weights.shape for weights in stage1.attentions] == [(4, 4, tokens, tokens)] * 2
    for weights in stage1.cross_attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 4, tokens))
        assert all(not weights[row, ..., length:].any() for row, length in enumerate(lengths))
    full = model(**inputs, output_hidden_states=True, output_attentions=True)
    logits = model.get_output_embeddings()(full.hidden_states[-1][:, -tokens:])
    torch.testing.assert_close(logits, full.logits)
    assert len(full.attentions) == 2 and full.cross_attentions is None
    loss, logits, _ = model(**inputs, return_dict=False)
    assert torch.equal(loss, full.loss) and torch.equal(logits, full.logits)


def test_deleted_embeddings_are_not_read(model, processor, batch):
    labels = processor(text=TEXTS)["labels"]
    aligned = torch.randn(4, 5, model.config.text_config.hidden_size)
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [1, 1, 0, 1, 1]])
    loss = model(labels=labels, aligned_embeds=aligned, aligned_mask=mask).loss
    noisy = torch.where(mask[..., None].bool(), aligned, torch.full_like(aligned, 50.0))
    torch.testing.assert_close(model(labels=labels, aligned_embeds=noisy, aligned_mask=mask).loss, loss)


@pytest.mark.parametrize("llm_inputs", ["nearest", "continuous"])
def test_what_stage_1_wrote_is_read_in_the_place_of_the_transcript(build_model, processor, batch, llm_inputs):
    model = build_model(llm_inputs=llm_inputs)
    labels = processor(text=TEXTS)["labels"]
    ids = torch.tensor([[5, 9, 12], [7, 8, -100], [40, -100, -100], [3, 4, 5]])
    embeds = model.get_input_embeddings()(ids.clamp_min(0))
    if llm_inputs == "continuous":
        embeds = model.teacher_forced(*model.encode(**batch), ids)[:, :-1]
    expected = model(labels=labels, aligned_embeds=embeds, aligned_mask=(ids != -100).long()).loss
    torch.testing.assert_close(model(**batch, labels=labels, alignment_ids=ids).loss, expected)
    deleted = torch.tensor([[1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1]])
    expected = model(labels=labels, aligned_embeds=embeds, aligned_mask=deleted).loss
    torch.testing.assert_close(model(**batch, labels=labels, alignment_ids=ids, aligned_mask=deleted).loss, expected)
    with pytest.raises(ValueError, match="alignment_ids are what the LLM reads"):
        model(**batch, labels=labels, alignment_ids=ids, use_llm=False)
    with pytest.raises(ValueError, match="aligned_embeds and alignment_ids: give one of the two"):
        model(**batch, labels=labels, alignment_ids=ids, aligned_embeds=embeds)


def test_the_mask_is_applied_and_trained(build_model, processor):
    model = build_model()
    labels = processor(text=TEXTS)["labels"]
    width = model.config.text_config.hidden_size
    aligned = torch.randn(4, 5, width)
    masked = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    blank = aligned.masked_fill(masked[..., None].bool(), 0.0)
    expected = model(labels=labels, aligned_embeds=blank).loss
    torch.testing.assert_close(model(labels=labels, aligned_embeds=aligned, masked=masked).loss, expected)
    model.add_mask_embedding()
    torch.testing.assert_close(model(labels=labels, aligned_embeds=aligned, masked=masked).loss, expected)
    vector = torch.randn(width)
    model.mask_embedding = torch.nn.Parameter(vector)
    replaced = aligned.clone().requires_grad_()
    with torch.no_grad():
        replaced[masked.bool()] = vector
    expected = model(labels=labels, aligned_embeds=replaced).loss
    expected.backward()
    loss = model(labels=labels, aligned_embeds=aligned, masked=masked).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close(model.mask_embedding.grad, replaced.grad[masked.bool()].sum(0))


@pytest.fixture(scope="module")
def half_backbones(backbones, tmp_path_factory):
    """As the published ones are: a Whisper in float16, and a chat model in bfloat16 that samples by default."""
    folder = tmp_path_factory.mktemp("half")
    shutil.copytree(backbones[0], folder / "whisper")
    shutil.copytree(backbones[1], folder / "llm")
    WhisperForConditionalGeneration.from_pretrained(backbones[0]).half().save_pretrained(folder / "whisper")
    language_model = Qwen3ForCausalLM.from_pretrained(backbones[1]).bfloat16()
    language_model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=20)
    language_model.save_pretrained(folder / "llm")
    return str(folder / "whisper"), str(folder / "llm")


def test_half_precision_backbones_that_sample(half_backbones, processor, batch, tmp_path):
    torch.manual_seed(1)
    model = SeamForSpeechRecognition.from_backbones(*half_backbones, processor, lora_rank=4).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    first = model.generate(**batch)
    assert torch.equal(first, model.generate(**batch))
    model.save_pretrained(tmp_path)
    assert torch.equal(first, SeamForSpeechRecognition.from_pretrained(tmp_path).eval().generate(**batch))


def test_parts_of_different_precision_work_together(build_model, processor, batch):
    model = build_model()
    model.encoder.half()
    model.language_model.bfloat16()
    assert model.generate(**batch, max_new_tokens=4).shape == (4, 4)
    loss = model(**batch, **processor(text=TEXTS)).loss
    assert torch.isfinite(loss)


def test_frozen_parts_have_no_dropout_in_training(build_model, batch):
    model = build_model()
    model.encoder.dropout = 0.5
    for layer in model.encoder.layers:
        layer.dropout = 0.5
    model.requires_grad_(False)
    model.bridge.requires_grad_(True)
    model.train()
    assert model.bridge.training and not model.encoder.training and not model.language_model.training
    assert torch.equal(model.encode(**batch)[0], model.encode(**batch)[0])
    model.eval()
    assert not model.bridge.training


def test_too_long_a_transcript_is_refused(model, processor, batch):
    with pytest.raises(ValueError, match="40 tokens, but the aligner has positions for 23"):
        model.teacher_forced(*model.encode(**batch), torch.zeros(4, 40, dtype=torch.long))


def test_unknown_fields_are_refused(backbones, processor):
    with pytest.raises(ValueError, match="SeamConfig has no field 'alignment_lamda'"):
        SeamForSpeechRecognition.from_backbones(*backbones, processor, alignment_lamda=0.3)


def test_forward_needs_labels_and_speech(model, processor):
    with pytest.raises(ValueError, match="labels are required"):
        model(input_features=torch.zeros(1, 16, 200))
    with pytest.raises(ValueError, match="input_features and speech_states"):
        model(labels=torch.tensor([[1, 2]]))


def test_reload_equals_original(model, processor, batch, tmp_path):
    labels = processor(text=TEXTS)["labels"]
    model.save_pretrained(tmp_path / "once")
    processor.save_pretrained(tmp_path / "once")
    once = SeamForSpeechRecognition.from_pretrained(tmp_path / "once").eval()
    once.save_pretrained(tmp_path / "twice")
    twice = SeamForSpeechRecognition.from_pretrained(tmp_path / "twice").eval()
    for again in (once, twice):
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        assert torch.equal(again.generate(**batch), model.generate(**batch))
        assert torch.equal(again(**batch, labels=labels).logits, model(**batch, labels=labels).logits)
    assert SeamProcessor.from_pretrained(tmp_path / "once").prompt_ids() == model.config.prompt_token_ids
    assert not list(tmp_path.rglob("*.bin"))


def test_no_path_of_this_machine_is_saved(model, processor, backbones, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for path in (*tmp_path.glob("*.json"), *tmp_path.glob("*.jinja")):
        assert str(Path(backbones[0]).parent) not in path.read_text(), path.name


def test_auto_classes(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForSpeechSeq2Seq):
        assert type(auto.from_pretrained(tmp_path)) is SeamForSpeechRecognition
    assert type(AutoProcessor.from_pretrained(tmp_path)) is SeamProcessor


def test_the_vocabulary_can_grow(build_model, processor, batch, tmp_path):
    model, labels = build_model(), processor(text=TEXTS)["labels"]
    before = model(**batch, labels=labels).logits
    size = before.shape[-1] + 8
    model.resize_token_embeddings(size)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters())
    model.save_pretrained(tmp_path)
    logits = SeamForSpeechRecognition.from_pretrained(tmp_path).eval()(**batch, labels=labels).logits
    assert logits.shape[-1] == size
    torch.testing.assert_close(logits[..., :-8], before)


def test_tied_embeddings_are_stored_once(model, tmp_path):
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert sum("embed_tokens" in name or "lm_head" in name for name in names) == 1


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_a_checkpoint_that_does_not_fit_is_refused(model, tmp_path, change):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "bridge.output_projection.weight"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights["bridge.more.weight"] = torch.zeros(2)
    else:
        weights[name] = weights[name][:-1].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 {change} keys \\(.*bridge"):
        SeamForSpeechRecognition.from_pretrained(tmp_path)


def test_bfloat16(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    half = SeamForSpeechRecognition.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.generate(**batch, max_new_tokens=5).shape[0] == 4


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(model, batch, tmp_path, implementation):
    model.save_pretrained(tmp_path)
    other = SeamForSpeechRecognition.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    assert other.bridge.config._attn_implementation == implementation
    assert torch.equal(other.generate(**batch), model.generate(**batch))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_llm_leaves_encoder_bridge_draft_and_lora_in_full(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    checkpoint = Path(__file__).parents[2] / "checkpoints" / "tiny"
    quantization_config = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32
    )
    SeamForSpeechRecognition.from_pretrained(checkpoint).add_draft_head(range(9)).save_pretrained(tmp_path)
    model = SeamForSpeechRecognition.from_pretrained(tmp_path, quantization_config=quantization_config)
    quantized = {n for n, module in model.named_modules() if type(module).__module__.startswith("bitsandbytes")}
    assert quantized and all(name.startswith("language_model") and name.endswith("base_layer") for name in quantized)
    processor = SeamProcessor.from_pretrained(checkpoint)
    inputs = processor(audio=checkpoint.parent / "recordings" / "audio" / "000000.wav")
    assert processor.batch_decode(model.generate(**inputs)) == ["set the light to ten degrees"]
    model.save_pretrained(tmp_path / "quantized")
    file = tmp_path / "quantized" / "config.json"
    file.write_text(file.read_text().replace('"bridge",', '"aligner",'))  # as it was called when this was saved
    assert '"aligner",' in json.dumps(json.loads(file.read_text())["quantization_config"])
    again = SeamForSpeechRecognition.from_pretrained(tmp_path / "quantized")
    assert torch.equal(again.generate(**inputs), model.generate(**inputs))


def test_stage_1_makes_its_own_embeddings(model, processor, waveforms):
    batch = processor(audio=waveforms[:1], text=["one two three"])
    with pytest.raises(ValueError, match="aligned_embeds are what the LLM reads"):
        model(**batch, use_llm=False, aligned_embeds=torch.zeros(1, 3, model.config.text_config.hidden_size))
