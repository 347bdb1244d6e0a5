"""The tiny stand-ins: a tokenizer that loses nothing, tasks whose replies are learned, and a Whisper with CTC heads."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperForConditionalGeneration

from seam.experiments import tiny_backbones

pytestmark = pytest.mark.oldest

SENTENCES = ["turn on the light", "one two three", "the old goat eats the hay"]


def test_tokenizer_loses_nothing(backbones):
    tokenizer = AutoTokenizer.from_pretrained(backbones[1])
    for text in (*SENTENCES, "Ünïcode, punctuation! 123", "  spaces  "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(chat).input_ids.count(tokenizer.eos_token_id) == 1


def test_backbones_are_of_the_real_classes(backbones):
    assert type(AutoModelForCausalLM.from_pretrained(backbones[1])).__name__ == "Qwen3ForCausalLM"
    whisper = WhisperForConditionalGeneration.from_pretrained(backbones[0])
    assert whisper.config.max_source_positions == 100  # 2 s


def test_tasks_learn_replies_and_repeat_themselves(backbones):
    tokenizer = AutoTokenizer.from_pretrained(backbones[1])
    tasks = tiny_backbones.TextTasks(tokenizer, SENTENCES, 200, seed=3)
    kinds = set()
    for index in range(len(tasks)):
        item = tasks[index]
        assert all(torch.equal(item[key], tasks[index][key]) for key in item)
        learned = item["labels"] != -100
        assert torch.equal(item["labels"][learned], item["input_ids"][learned])
        assert item["labels"][-1] == tokenizer.eos_token_id
        text = tokenizer.decode(item["input_ids"])
        if text.startswith("<|im_start|>user\n"):
            request, reply = text.split("<|im_end|>\n<|im_start|>assistant\n")
            kinds.add(request.split("\n")[1].split(":")[0])
            assert tokenizer.decode(item["labels"][learned]) == reply
            if "Repeat" in request:
                assert request.split(":", 1)[1] + "<|im_end|>" == reply
        else:
            kinds.add("plain")
            assert text.removesuffix("<|im_end|>") in SENTENCES and learned.all()
    assert kinds == {"plain", "Repeat the following", "Correct the following"}


def test_what_is_to_be_corrected_is_right_or_up_to_half_wrong(backbones):
    tokenizer = AutoTokenizer.from_pretrained(backbones[1])
    sentence = " ".join(["seven"] * 50)
    shares = tiny_backbones.TaskShares(corruption=[0.0, 0.5])
    tasks = tiny_backbones.TextTasks(tokenizer, [sentence, "one two three four five six nine"], 1, 3, shares)
    rates = []
    for seed in range(300):
        right = tasks._corrupt(sentence, random.Random(seed)).split().count("seven")
        rates.append(1 - right / 50)
    # Uniform from none to half are corrupted, of which 0.9 are lost; 1 substitution in 8 draws the same word.
    assert min(rates) < 0.05 and 0.18 < sum(rates) / 300 < 0.24 and 0.35 < max(rates) < 0.7


def test_shares_of_the_tasks(backbones):
    tokenizer = AutoTokenizer.from_pretrained(backbones[1])
    shares = tiny_backbones.TaskShares(plain=0.5, tokens=0.0, words=0.0, repeat=0.0)
    tasks = tiny_backbones.TextTasks(tokenizer, SENTENCES, 400, 3, shares)
    texts = [tokenizer.decode(tasks[index]["input_ids"]) for index in range(400)]
    corrected = sum("Correct the following" in text for text in texts)
    assert 150 < corrected < 250 and not any("Repeat" in text for text in texts)


def test_character_ids():
    ids = tiny_backbones.character_ids("One two's!")
    assert "".join(tiny_backbones.CHARACTERS[i] for i in ids) == "one two's"


def test_ctc_heads_train_the_encoder_and_are_left_out(backbones, processor, waveforms):
    whisper = WhisperForConditionalGeneration.from_pretrained(backbones[0])
    model = tiny_backbones.WhisperWithCTC(whisper, ctc_weight=1.0)
    texts = ["one", "one two", "three", "turn on"]
    letters = [tiny_backbones.character_ids(text) for text in texts]
    batch = processor(audio=waveforms, text=texts)
    loss = model(**batch, characters=torch.nn.utils.rnn.pad_sequence(letters, True, padding_value=-100)).loss
    loss.backward()
    assert torch.isfinite(loss) and whisper.model.encoder.conv1.weight.grad.abs().sum() > 0
    assert not any("head" in name for name in whisper.state_dict())
