"""A model that is built of its backbones and transcribes without training: its tokens are chosen, its fields set."""

import copy
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from seam.modeling_seam import build_untrained
from seam.modeling_seam.building import choose_boundary_tokens

pytestmark = pytest.mark.oldest

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


@pytest.fixture
def changed(backbones, tmp_path):
    """Return a function that saves the tiny LLM with other embeddings of some tokens: another token's, or zero."""

    def changed(**rows: str | None) -> str:
        model, tokenizer = (cls.from_pretrained(backbones[1]) for cls in (AutoModelForCausalLM, AutoTokenizer))
        names, ids = {"start": START, "end": END, "pad": PAD}, tokenizer.convert_tokens_to_ids
        with torch.no_grad():
            table = model.get_input_embeddings().weight
            table[ids(PAD)].normal_(std=0.1)  # as of padding it is zero
            for name, other in rows.items():
                table[ids(names[name])] = 0 if other is None else 1.1 * table[ids(other)] + 1e-3
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return changed


def test_the_end_of_turns_ends_stage_1(backbones):
    tokens = choose_boundary_tokens(backbones[1])
    assert (tokens.boa, tokens.eoa) == (START, END)
    assert tokens.reason.startswith(f"{END} ends the model's turns, and no other embedding is nearer than cosine 0.")


def test_an_end_with_a_twin_is_left_out(changed):
    tokens = choose_boundary_tokens(changed(end="q", start="z"))
    assert (tokens.boa, tokens.eoa) == (START, PAD)
    assert tokens.reason.startswith(f"{PAD} has no nearer neighbour than cosine 0.")
    assert tokens.reason.endswith(f"; {END}, which ends the model's turns, has one at 1.000")


def test_a_row_of_zeros_is_no_embedding(changed):
    assert choose_boundary_tokens(changed(end="q", pad=None)).eoa == START
    with pytest.raises(ValueError, match=r"has 1 special tokens; <BOA> and <EOA> have to be two"):
        choose_boundary_tokens(changed(start=None, pad=None))


def test_begin_and_end_are_two(changed):
    tokens = choose_boundary_tokens(changed(end="q", pad="z"))
    assert (tokens.boa, tokens.eoa) == (PAD, START)


def test_what_is_missing_is_named(multilingual, tmp_path):
    with pytest.raises(OSError):
        build_untrained(multilingual[0], str(tmp_path / "nowhere"))
    with pytest.raises(OSError):
        build_untrained(str(Path(tmp_path) / "nowhere"), multilingual[1])


def test_build_untrained(multilingual, waveforms):
    model, processor, tokens = build_untrained(*multilingual, language="German", lora_rank=2)
    config = model.config
    assert (config.token_projection, config.speech_margin, config.encoder_window) == ("table", 4.0, "audio")
    assert (config.llm_inputs, config.alignment_reduction, config.lora_rank) == ("continuous", "mean", 2)
    assert config.aligner_prompt[1] == "<|de|>" and processor.leading_space and not model.training
    assert (processor.boa_token, processor.eoa_token) == (tokens.boa, tokens.eoa) and tokens.eoa in tokens.reason
    texts = processor.batch_decode(model.generate(**processor(audio=waveforms), use_llm=False))
    assert all(texts) and not any(text.startswith(" ") for text in texts)


ADAPTER = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    "add",
    [
        lambda model: get_peft_model(model, LoraConfig(**ADAPTER)),
        lambda model: get_peft_model(model, LoraConfig(**ADAPTER), adapter_name="another"),
        lambda model: get_peft_model(model, LoraConfig(**ADAPTER), mixed=True),
        lambda model: get_peft_model(model, IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
        lambda model: get_peft_model(model.language_model, LoraConfig(**ADAPTER)),
        lambda model: inject_adapter_in_model(LoraConfig(**ADAPTER), model),
        lambda model: get_peft_model(copy.deepcopy(model), LoraConfig(**ADAPTER)),
    ],
)
def test_another_adapter_does_not_wipe_the_models_own(model, add):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match="the model has LoRA of its own, .* fold it into the weights first"):
        add(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert list(model.language_model.peft_config) == ["default"]


def test_once_it_is_folded_in_another_may_come(build_model, processor, waveforms):
    inputs = processor(audio=waveforms[:2], text=["one", "one two three"])
    for model in (build_model().merge_lora(), build_model(lora_rank=0)):
        with torch.no_grad():
            expected = model(**inputs).logits
            wrapped = get_peft_model(model, LoraConfig(**ADAPTER))
            assert isinstance(wrapped, PeftModel) and list(wrapped.peft_config) == ["default"]
            torch.testing.assert_close(wrapped(**inputs).logits, expected)
        assert any(parameter.requires_grad for parameter in wrapped.parameters())
