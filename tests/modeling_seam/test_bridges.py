"""The baselines: their sizes and rates as published, and that all of SEAM works around each of them."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import pipeline

from seam import configuration_seam
from seam.configuration_seam import SeamConfig
from seam.modeling_seam import SeamForSpeechRecognition, bridges
from seam.modeling_seam.bridges import BRIDGES, CTCBridge, LinearBridge, QFormerBridge, build_bridge

pytestmark = pytest.mark.oldest

TINY = {
    "linear": {"hidden_size": 64},
    "qformer": {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64},
    "ctc": {},
}


def build(backbones, processor, name, **config) -> SeamForSpeechRecognition:
    torch.manual_seed(1)
    config = {"lora_rank": 4, "bridge": name, "bridge_config": TINY.get(name) or None, **config}
    model = SeamForSpeechRecognition.from_backbones(*backbones, processor, **config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.05)
            if key.startswith("bridge.") and parameter.ndim == 2:
                parameter.normal_(std=0.3)  # the audio must make a difference
    return model


@pytest.fixture(scope="module", params=TINY)
def model(request, backbones, processor):
    return build(backbones, processor, request.param)


# ---- as published ----


@pytest.fixture(scope="module")
def papers() -> SeamConfig:
    return SeamConfig(lora_rank=0)


def size(bridge: nn.Module) -> int:
    return sum(parameter.numel() for parameter in bridge.parameters())


def test_the_linear_projector_is_slam_asrs(papers):
    bridge = LinearBridge(papers).eval()
    assert size(bridge) == (5 * 1280 + 1) * 2048 + (2048 + 1) * 2560
    embeds, mask = bridge(torch.zeros(1, 1500, 1280), torch.ones(1, 1500, dtype=torch.long))
    assert embeds.shape == (1, 300, 2560) and mask.sum() == 300  # 10.0 a second


def test_the_q_former_is_salmonns(papers):
    bridge = QFormerBridge(papers).eval()
    embeds, mask = bridge(torch.zeros(1, 1500, 1280), torch.ones(1, 1500, dtype=torch.long))
    assert embeds.shape == (1, 88, 2560) and mask.sum() == 88  # of 30 s
    # Two layers of BERT's size with self- and cross-attention, a query, the norms, the output.
    d, wide, speech = 768, 3072, 1280
    attention = 2 * (d + 1) * d + 2 * d  # queries and output, and the norm
    layer = attention + 2 * (d + 1) * d + attention + 2 * (speech + 1) * d + (d + 1) * wide + (wide + 1) * d + 2 * d
    assert size(bridge) == 2 * layer + d + 2 * d + 2 * speech + (d + 1) * 2560


def test_the_ctc_head_writes_into_the_llms_vocabulary(papers):
    bridge = build_bridge(SeamConfig(bridge="ctc", lora_rank=0))
    assert size(bridge) == (1280 + 1) * 151937
    assert set(bridge.state_dict()) == {"head.weight", "head.bias"}  # names of checkpoints that exist


# ---- what each of them does with speech ----


@pytest.mark.parametrize(("states", "groups"), [(1, 1), (5, 1), (6, 2), (10, 2), (11, 3)])
def test_the_projector_groups_states_and_drops_none(states, groups, papers):
    bridge = LinearBridge(papers, hidden_size=8)
    embeds, mask = bridge(torch.randn(1, states, 1280), torch.ones(1, states, dtype=torch.long))
    assert embeds.shape[1] == groups and mask.tolist() == [[1] * groups]
    states = torch.randn(1, states, 1280, requires_grad=True)
    bridge(states, torch.ones(states.shape[:2], dtype=torch.long))[0].sum().backward()
    assert (states.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize(("states", "windows"), [(1, 1), (17, 1), (25, 1), (26, 2), (34, 2), (42, 2), (43, 3)])
def test_the_last_window_takes_what_is_left(states, windows, papers):
    bridge = QFormerBridge(papers, num_hidden_layers=1).eval()
    states = torch.randn(1, states, 1280, requires_grad=True)
    embeds, mask = bridge(states, torch.ones(states.shape[:2], dtype=torch.long))
    assert embeds.shape[1] == windows and mask.tolist() == [[1] * windows]
    embeds.square().sum().backward()
    assert (states.grad.abs().sum(-1) > 0).all()  # every state has an influence
    states.grad = None
    bridge(states, torch.ones(states.shape[:2], dtype=torch.long))[0][:, 0].square().sum().backward()
    seen = (states.grad.abs().sum(-1) > 0)[0]
    assert seen[:17].all() and (windows == 1 or not seen[17:].any())


def test_queries_make_embeddings(papers):
    bridge = QFormerBridge(papers, queries=3, num_hidden_layers=1).eval()
    embeds, mask = bridge(torch.randn(2, 40, 1280), torch.tensor([[1] * 40, [1] * 20 + [0] * 20]))
    assert embeds.shape == (2, 6, 2560) and mask.tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]


def ctc(path: list[int], vocabulary: int = 6) -> CTCBridge:
    """Make a head that outputs a given path, whatever the speech: states are one-hot positions."""
    text = {"vocab_size": vocabulary, "hidden_size": 16, "num_attention_heads": 2, "head_dim": 8, "model_type": "qwen3"}
    audio = {"d_model": len(path), "encoder_attention_heads": 1, "decoder_attention_heads": 1}
    config = SeamConfig(
        bridge="ctc", audio_config=audio, text_config=text, boa_token_id=0, eoa_token_id=1, lookup_excluded_ids=[0]
    )
    head = CTCBridge(config)
    with torch.no_grad():
        head.head.bias.zero_()
        head.head.weight.zero_()
        for place, token in enumerate(path):
            head.head.weight[token, place] = 9.0
    return head


def test_excluded_ids_are_never_decoded():
    head = ctc([0, 1, 3, 6])  # <BOA>, <EOA>, a token, the blank
    ids, _ = head.decode(torch.eye(4)[None], torch.ones(1, 4, dtype=torch.long))
    assert not {0, 1} & set(ids.flatten().tolist())


# ---- the whole model around each ----


def test_a_batch_gives_what_each_gives_alone(model, processor, waveforms):
    batch = model.generate(**processor(audio=waveforms))
    for row, waveform in zip(batch, waveforms, strict=True):
        alone = model.generate(**processor(audio=waveform))[0]
        assert processor.decode(row) == processor.decode(alone)
    assert len({tuple(row.tolist()) for row in batch}) > 1


def test_reload_gives_the_same(model, processor, waveforms, tmp_path):
    model.save_pretrained(tmp_path)
    again = SeamForSpeechRecognition.from_pretrained(tmp_path)
    inputs = processor(audio=waveforms)
    assert type(again.bridge) is type(model.bridge)
    assert torch.equal(again.generate(**inputs), model.generate(**inputs))


def test_the_loss_is_that_of_the_reply(model, processor, waveforms):
    """Eq. 4 on whatever the bridge gives: the prompt written out by hand."""
    inputs = processor(audio=waveforms[:1], text=["one two"])
    output = model(**inputs)
    embeds = model.aligned(*model.speech(inputs["input_features"], inputs["attention_mask"]), inputs["labels"])[0][0]
    prompt, reply = torch.tensor(processor.prompt_ids()), inputs["labels"][0]
    place = int((prompt == processor.audio_token_id).nonzero())
    table = model.get_input_embeddings()
    rows = torch.cat([table(prompt[:place]), embeds, table(prompt[place + 1 :]), table(reply[:-1])])
    logits = model.language_model(inputs_embeds=rows[None]).logits[0, -len(reply) :]
    assert output.loss.item() == pytest.approx(nn.functional.cross_entropy(logits, reply).item(), rel=1e-4)


def test_the_audio_reaches_the_loss(model, processor, waveforms):
    inputs = processor(audio=waveforms[:2], text=["one two", "three"])
    model.bridge.requires_grad_(True)
    model(**inputs).loss.backward() if not model.bridge.has_stage_1 else model(**inputs, use_llm=False).loss.backward()
    assert all(parameter.grad is not None for parameter in model.bridge.parameters())
    model.zero_grad()


def test_bridges_without_a_stage_1_say_so(model, processor, waveforms):
    inputs = processor(audio=waveforms[:1])
    if model.bridge.has_stage_1:
        stage1_ids = model.generate(**inputs, use_llm=False)
        output = model.generate(**inputs, return_dict_in_generate=True)
        assert processor.decode(output.alignment_sequences[0]) == processor.decode(stage1_ids[0])
        assert output.sequences[0, 0] == output.alignment_sequences[0, 0]  # the guiding token
        return
    with pytest.raises(ValueError, match="use_llm=False: the bridge .* has no Stage 1; accepted: aligner, ctc"):
        model.generate(**inputs, use_llm=False)
    output = model.generate(**inputs, return_dict_in_generate=True)
    assert output.alignment_sequences is None and output.aligned_embeds.shape[:2] == output.alignment_mask.shape
    guided = model.generate(**inputs, first_token_guidance=True)
    assert torch.equal(guided, model.generate(**inputs, first_token_guidance=False))


def test_settings_that_do_not_exist(backbones, processor):
    with pytest.raises(StrictDataclassError, match="bridge is 'perceiver'; accepted: aligner, linear, qformer, ctc"):
        SeamConfig(bridge="perceiver")
    with pytest.raises(ValueError, match="bridge_config of the bridge 'linear'.*stride"):
        build(backbones, processor, "linear", bridge_config={"stride": 2})
    with pytest.raises(StrictDataclassError, match="bridge_config is for the baselines"):
        SeamConfig(bridge_config={"states": 5})
    with pytest.raises(StrictDataclassError, match="a CTC head predicts tokens"):
        SeamConfig(bridge="ctc", llm_inputs="continuous")


# ---- another one ----


class MeanBridge(nn.Module):
    """One embedding for the whole utterance."""

    has_stage_1 = False

    def __init__(self, config):
        super().__init__()
        self.output = nn.Linear(config.audio_config.d_model, config.get_text_config().hidden_size)

    def forward(self, speech_states, speech_mask):
        mean = (speech_states * speech_mask[..., None]).sum(1) / speech_mask.sum(1, keepdim=True)
        return self.output(mean)[:, None], speech_mask[:, :1]


def test_another_bridge_is_a_class_and_a_name(backbones, processor, waveforms, monkeypatch, tmp_path):
    monkeypatch.setitem(bridges.BRIDGES, "mean", MeanBridge)
    monkeypatch.setattr(configuration_seam, "BRIDGES", (*configuration_seam.BRIDGES, "mean"))
    model = build(backbones, processor, "mean")
    inputs = processor(audio=waveforms, text=["one"] * len(waveforms))
    assert torch.isfinite(model(**inputs).loss)
    model.save_pretrained(tmp_path)
    again = SeamForSpeechRecognition.from_pretrained(tmp_path)
    assert torch.equal(again.generate(**inputs), model.generate(**inputs))


def test_every_name_has_a_class():
    assert set(configuration_seam.BRIDGES) == set(BRIDGES)


def test_the_pipeline_takes_every_bridge(model, processor, waveforms, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("automatic-speech-recognition", model=str(tmp_path), trust_remote_code=True)
    text = processor.decode(model.generate(**processor(audio=waveforms[0]))[0]).strip()
    assert pipe(waveforms[0])["text"] == text
