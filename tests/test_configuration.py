"""Field checks, defaults and the round trip to JSON."""

import pytest

from seam.configuration_seam import SeamConfig

pytestmark = pytest.mark.oldest


def test_defaults_are_the_papers_sizes():
    config = SeamConfig()
    aligner = config.aligner_config
    assert (aligner.decoder_layers, aligner.decoder_attention_heads, aligner.d_model) == (32, 20, 1280)
    assert (config.audio_config.encoder_layers, config.audio_config.d_model) == (32, 1280)
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (2560, 151936)
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (32, 64, 0.1)
    assert (config.alignment_lambda, config.alignment_reduction, config.llm_inputs) == (0.5, "sum", "nearest")


def test_round_trip(tmp_path):
    config = SeamConfig(
        alignment_lambda=0.25,
        prompt_token_ids=[1, 151669, 2],
        lookup_excluded_ids=[5],
        active_vocabulary=[6],
        draft_vocabulary=[6, 8],
    )
    config.save_pretrained(tmp_path)
    assert SeamConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert "id2label" not in (tmp_path / "config.json").read_text()  # what every config has is left out of the parts


def test_a_table_round_trips_and_its_prompt_takes_positions(tmp_path):
    prompt = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>"]
    config = SeamConfig(
        token_projection="table",
        mixture_size=2,
        aligner_prompt_tokens=[*prompt, "<|notimestamps|>"],
        aligner_prompt=prompt,
        token_table_trained=True,
        speech_margin=1.5,
        encoder_window="audio",
    )
    config.save_pretrained(tmp_path)
    again = SeamConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert (SeamConfig().max_alignment_tokens, again.max_alignment_tokens) == (447, 444)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"boa_token_id": 5, "eoa_token_id": 5}, "boa_token_id and eoa_token_id are both 5"),
        ({"eoa_token_id": 10**7}, "eoa_token_id is 10000000, outside .* 151936"),
        ({"boa_token_id": -1}, "boa_token_id is -1, outside"),
        ({"alignment_reduction": "max"}, "accepted: sum, mean"),
        ({"llm_inputs": "both"}, "accepted: nearest, continuous"),
        ({"alignment_lambda": 2.0}, "accepted: 0 to 1"),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"lora_rank": "many"}, "lora_rank"),
        ({"prompt_token_ids": [1, 2]}, "exactly once, found 0"),
        ({"prompt_token_ids": [151669, 151669]}, "exactly once, found 2"),
        ({"lookup_excluded_ids": [151936]}, "lookup_excluded_ids holds 151936"),
        ({"active_vocabulary": [3, 151936]}, "active_vocabulary holds 151936, outside"),
        ({"active_vocabulary": []}, "active_vocabulary holds no text token"),
        ({"active_vocabulary": [7, 151645], "lookup_excluded_ids": [7]}, "active_vocabulary holds no text token"),
        ({"draft_vocabulary": [3, 151936]}, "draft_vocabulary holds 151936, outside"),
        ({"draft_vocabulary": []}, "draft_vocabulary must hold ids in ascending order; null stands for no draft head"),
        ({"draft_vocabulary": [8, 6]}, "draft_vocabulary must hold ids in ascending order"),
        ({"draft_vocabulary": [6, 6]}, "draft_vocabulary must hold ids in ascending order"),
        ({"draft_vocabulary": [6], "bridge": "linear"}, "the bridge 'linear' takes no draft; accepted: aligner"),
        ({"token_projection": "rows"}, "token_projection is 'rows'; accepted: linear, table"),
        ({"token_projection": "table", "bridge": "ctc"}, "token_projection is 'table', but the bridge 'ctc' has no"),
        ({"token_projection": "table", "mixture_size": 0}, "mixture_size is 0; accepted: 1 or more"),
        ({"aligner_prompt": ["<|en|>"]}, "aligner_prompt is for token_projection='table'"),
        ({"aligner_prompt_tokens": ["<|en|>"]}, "aligner_prompt_tokens is for token_projection='table'"),
        ({"token_table_trained": True}, "token_table_trained is for token_projection='table'"),
        ({"token_projection": "table", "aligner_prompt": ["<|en|>"]}, "'<|en|>', which is not among aligner_prompt_t"),
        ({"speech_margin": -1}, "speech_margin is -1; accepted: 0 s or more"),
        ({"encoder_window": "short"}, "encoder_window is 'short'; accepted: full, audio"),
        ({"encoder_window": "audio", "mask_speech_padding": False}, "which needs mask_speech_padding"),
        ({"aligner_config": {"d_model": 64, "decoder_attention_heads": 4}}, "aligner_config.d_model is 64"),
        ({"aligner_config": {"d_model": 1280, "decoder_attention_heads": 7}}, "multiple of"),
    ],
)
def test_what_does_not_fit_is_named(fields, message):
    with pytest.raises(Exception, match=message):
        SeamConfig(**fields)


def test_another_architecture_is_refused(backbones):
    with pytest.raises(ValueError, match="architecture 'whisper', not of 'seam'"):
        SeamConfig.from_pretrained(backbones[0])


def test_aligner_caches_have_the_decoders_size():
    config = SeamConfig(
        aligner_config={"d_model": 1280, "encoder_layers": 9, "decoder_layers": 3, "decoder_attention_heads": 20}
    )
    assert config.aligner_config.num_hidden_layers == 3
