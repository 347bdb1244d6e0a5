"""Configuration of SEAM: a speech encoder, an alignment decoder and a language model."""

from functools import partial
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, WhisperConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

ALIGNMENT_REDUCTIONS = ("sum", "mean")
LLM_INPUTS = ("nearest", "continuous")
TOKEN_PROJECTIONS = ("linear", "table")
ENCODER_WINDOWS = ("full", "audio")
BRIDGES = ("aligner", "linear", "qformer", "ctc")
# Fields of transformers' quantization configs that name modules to be left in full precision.
KEPT_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert")
MOST_LAYERS = 10_000  # a part has
WHISPER_LARGE_DECODER = {"d_model": 1280, "decoder_layers": 32, "decoder_attention_heads": 20, "decoder_ffn_dim": 5120}
WHISPER_LARGE = {
    **WHISPER_LARGE_DECODER,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
}
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


@strict
class SeamConfig(PreTrainedConfig):
    r"""
    The sizes and settings of a [`SeamForSpeechRecognition`].

    The defaults are the paper's: the encoder of Whisper-large-v2, an alignment decoder of 32 layers x 20 heads x 1280,
    and Qwen3-4B (Section 3.4, Table 2).

    Args:
        audio_config (`dict` or `WhisperConfig`, *optional*):
            The speech encoder: any Whisper-family encoder. `max_source_positions` fixes its window:
            `2 * max_source_positions` mel frames of 10 ms.
        aligner_config (`dict` or `WhisperConfig`, *optional*):
            The alignment decoder. Only `d_model`, the `decoder_*` fields, the dropouts, `activation_function`,
            `init_std` and `max_target_positions` matter; it has no vocabulary table.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            The language model: anything `AutoModelForCausalLM` can build.
        bridge (`str`, *optional*, defaults to `"aligner"`):
            What stands between encoder and language model: SEAM's `"aligner"`, or a baseline:
            `"linear"` (SLAM-ASR), `"qformer"` (SALMONN), `"ctc"` (see `modeling_seam/bridges.py`).
        bridge_config (`dict`, *optional*): Settings of a baseline; the aligner's are `aligner_config`.
        token_projection (`str`, *optional*, defaults to `"linear"`):
            How the aligner reads and writes tokens: `"linear"` projections of the LLM's embeddings (Eq. 2), or a
            `"table"` that is re-written from Whisper's (see `modeling_seam/token_table.py`).
        mixture_size (`int`, *optional*, defaults to 8):
            With a table: the number of tokens, the best, whose embeddings are mixed into a prediction.
        aligner_prompt_tokens (`list[str]`, *optional*):
            With a table: Whisper's prompt tokens (start, languages, tasks), its rows after those of the vocabulary.
        aligner_prompt (`list[str]`, *optional*):
            With a table: those of them that precede `<BOA>`; `generate(language=..., task=...)` replaces some.
        token_table_trained (`bool`, *optional*, defaults to `False`):
            With a table: whether it was trained. If not, a light checkpoint leaves it out, to be re-written again.
        boa_token_id (`int`, *optional*, defaults to 151644):
            Id whose embedding starts Stage 1 (`<BOA>`, Algorithm 1). Default: `<|im_start|>` of Qwen3.
        eoa_token_id (`int`, *optional*, defaults to 151645):
            Id that ends Stage 1 (`<EOA>`). Default: `<|im_end|>` of Qwen3.
        audio_token_id (`int`, *optional*, defaults to 151669):
            The placeholder in the prompt that is replaced by the aligned embeddings. It needs no row in the
            embedding table.
        prompt_token_ids (`list[int]`, *optional*):
            The default prompt with exactly one `audio_token_id` in it, used by `generate` when it is given none.
        vocabulary_fingerprint (`str`, *optional*):
            Of all tokens of the language model's tokenizer and their ids: another tokenizer is refused.
        lookup_excluded_ids (`list[int]`, *optional*):
            Ids that the nearest-neighbour lookup never returns: special tokens and rows that no text uses.
            `eoa_token_id` is always reachable.
        active_vocabulary (`list[int]`, *optional*):
            The only ids that the lookup returns, beside `eoa_token_id`: those that the training text uses. The others
            are not even compared, which makes the lookup cheaper. By default the whole vocabulary.
        draft_vocabulary (`list[int]`, *optional*):
            The ids that the draft head can output, in ascending order: those that its training text uses. The head is
            a CTC head on the encoder, whose tokens the aligner verifies instead of decoding them one by one
            (`add_draft_head`, `seam train draft`). By default there is none.
        alignment_lambda (`float`, *optional*, defaults to 0.5):
            Weight of the squared distance against the cosine term (lambda of Eq. 3 and Eq. 7).
        alignment_reduction (`str`, *optional*, defaults to `"sum"`):
            `"sum"`: the squared distance is summed over dimensions, as Eq. 3 is printed; `"mean"`: averaged.
        llm_inputs (`str`, *optional*, defaults to `"nearest"`):
            What the language model receives as aligned embeddings: the embeddings of the nearest tokens, or the
            aligner's own `"continuous"` predictions.
        mask_speech_padding (`bool`, *optional*, defaults to `True`):
            Whether speech states past the end of the audio are hidden from the aligner.
        speech_margin (`float`, *optional*, defaults to 0.0):
            Seconds after the end of the audio whose states are not hidden: a Whisper decoder knows by the silence in
            them where to stop.
        encoder_window (`str`, *optional*, defaults to `"full"`):
            What the encoder hears: its `"full"` window, as Whisper does, or the `"audio"` and its margin, which takes
            less time. Where the two differ, a checkpoint does best with the one that it was trained with.
        lora_rank (`int`, *optional*, defaults to 32):
            Rank of the LoRA adapters on the language model; 0 builds none.
        lora_alpha (`int`, *optional*, defaults to 64): Scaling of the LoRA adapters.
        lora_dropout (`float`, *optional*, defaults to 0.1): Dropout before the LoRA adapters.
        lora_target_modules (`list[str]`, *optional*): Linear layers that get an adapter.
        learned_mask (`bool`, *optional*, defaults to `False`):
            Whether masking in Stage 3 (Section 3.5) uses a trained vector, `mask_embedding`, instead of zeros.
        alignment_only (`bool`, *optional*, defaults to `False`):
            Whether the language model is present by its embedding table only, which is all that Stage 1 needs.
        backbones (`dict`, *optional*):
            Where the frozen parts come from: `{"encoder": {...}, "llm": {...}}`, each with `id` (of the Hub),
            `revision` (a commit; none if it came from a package), `fingerprint` (of its weight files) and `samples` (of
            its weights, to know them again in another precision). `None` when they came from folders.
        light_checkpoint (`bool`, *optional*, defaults to `False`):
            Whether the weight file beside this config holds the bridge, draft head, LoRA and learned mask only; the
            rest is `backbones`.
        weights_fingerprint (`str`, *optional*):
            Of all bytes of the weight files beside this config, written by `save_pretrained`: other files are refused.
    """

    model_type = "seam"
    sub_configs = {"audio_config": WhisperConfig, "aligner_config": WhisperConfig, "text_config": AutoConfig}

    audio_config: dict | PreTrainedConfig | None = None
    aligner_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    bridge: str = "aligner"
    bridge_config: dict | None = None
    token_projection: str = "linear"
    mixture_size: int = 8
    aligner_prompt_tokens: list[str] | None = None
    aligner_prompt: list[str] | None = None
    token_table_trained: bool = False
    boa_token_id: int = 151644
    eoa_token_id: int = 151645
    audio_token_id: int = 151669
    prompt_token_ids: list[int] | None = None
    vocabulary_fingerprint: str | None = None
    lookup_excluded_ids: list[int] | None = None
    active_vocabulary: list[int] | None = None
    draft_vocabulary: list[int] | None = None
    alignment_lambda: float | int = 0.5
    alignment_reduction: str = "sum"
    llm_inputs: str = "nearest"
    mask_speech_padding: bool = True
    speech_margin: float | int = 0.0
    encoder_window: str = "full"
    lora_rank: int = 32
    lora_alpha: int = 64
    lora_dropout: float | int = 0.1
    lora_target_modules: list[str] | tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )

    learned_mask: bool = False
    alignment_only: bool = False
    backbones: dict | None = None
    light_checkpoint: bool = False
    weights_fingerprint: str | None = None

    def __post_init__(self, **kwargs):
        # Before `super`, which sets the attention implementation of all parts.
        for name, build, defaults in (
            ("audio_config", WhisperConfig, WHISPER_LARGE),
            ("aligner_config", WhisperConfig, WHISPER_LARGE_DECODER),
            ("text_config", partial(AutoConfig.for_model, model_type="qwen3"), QWEN3_4B),
        ):
            part = getattr(self, name)
            if not isinstance(part, PreTrainedConfig):
                setattr(self, name, build(**(defaults if part is None else part)))
        super().__post_init__(**kwargs)
        # Caches are sized by `num_hidden_layers`, which Whisper maps to `encoder_layers`; the aligner has no encoder.
        aligner: Any = self.aligner_config
        aligner.encoder_layers = aligner.decoder_layers
        aligner.encoder_attention_heads = aligner.decoder_attention_heads

    @classmethod
    def from_backbones(cls, audio_config: WhisperConfig, text_config: PreTrainedConfig, **fields) -> "SeamConfig":
        """Build a config around two backbones; by default the aligner has the sizes of the Whisper decoder."""
        fields.setdefault("aligner_config", audio_config.to_dict())
        return cls(audio_config=audio_config, text_config=text_config, **fields)

    @classmethod
    def default_config_fields(cls) -> dict:
        """Name the parts in whose configs transformers, from 5.20 on, leaves out what every config has by default."""
        return super().default_config_fields() | dict.fromkeys(cls.sub_configs, {})

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """Raise `OSError` without a config.json, where transformers would go on with the defaults: a model of 5 B."""
        damaged = OSError(f"{pretrained_model_name_or_path}: config.json is damaged: it is not a JSON object.")
        try:
            config_dict, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except TypeError as error:  # older versions of transformers take for granted that it is an object
            raise damaged from error
        if not config_dict:
            raise OSError(f"{pretrained_model_name_or_path} holds no config.json.")
        if not isinstance(config_dict, dict):
            raise damaged
        return config_dict, unused

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "SeamConfig":
        """Raise `ValueError` for the config of another architecture, which transformers would only warn about."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"this is a checkpoint of architecture {model_type!r}, not of {cls.model_type!r}.")
        _check_counts(config_dict)
        try:
            return super().from_dict(_with_new_names(config_dict), **kwargs)
        except (AttributeError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"config.json describes no model that can be built: {reason}") from error

    def validate_architecture(self) -> None:
        """Raise `ValueError` that names the field and what is accepted when the parts do not fit together."""
        audio: Any = self.audio_config
        aligner: Any = self.aligner_config
        if self.bridge == "aligner" and audio.d_model != aligner.d_model:
            raise ValueError(
                f"aligner_config.d_model is {aligner.d_model} but the speech encoder yields states of size "
                f"{audio.d_model}; the alignment decoder attends to them directly, so they must be equal."
            )
        if aligner.d_model % aligner.decoder_attention_heads:
            raise ValueError(
                f"aligner_config.d_model ({aligner.d_model}) must be a multiple of "
                f"aligner_config.decoder_attention_heads ({aligner.decoder_attention_heads})."
            )
        vocab_size = self.get_text_config().vocab_size
        for name in ("boa_token_id", "eoa_token_id"):
            if not 0 <= getattr(self, name) < vocab_size:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, outside the language model's vocabulary of {vocab_size} ids."
                )
        if self.boa_token_id == self.eoa_token_id:
            raise ValueError(f"boa_token_id and eoa_token_id are both {self.boa_token_id}; they must be two ids.")
        if self.prompt_token_ids is not None and self.prompt_token_ids.count(self.audio_token_id) != 1:
            raise ValueError(
                f"prompt_token_ids must hold audio_token_id ({self.audio_token_id}) exactly once, "
                f"found {self.prompt_token_ids.count(self.audio_token_id)} times."
            )
        for name in ("lookup_excluded_ids", "active_vocabulary", "draft_vocabulary"):
            outside = [i for i in getattr(self, name) or () if not 0 <= i < vocab_size]
            if outside:
                raise ValueError(f"{name} holds {outside[0]}, outside the vocabulary of {vocab_size} ids.")
        never = {*(self.lookup_excluded_ids or ()), self.eoa_token_id}
        if self.active_vocabulary is not None and never.issuperset(self.active_vocabulary):
            raise ValueError("active_vocabulary holds no text token that may be returned; null stands for all.")
        if self.draft_vocabulary is not None:
            if self.bridge != "aligner":
                raise ValueError(f"draft_vocabulary: the bridge {self.bridge!r} takes no draft; accepted: aligner.")
            if not self.draft_vocabulary or self.draft_vocabulary != sorted(set(self.draft_vocabulary)):
                raise ValueError("draft_vocabulary must hold ids in ascending order; null stands for no draft head.")
        for name, accepted in (
            ("alignment_reduction", ALIGNMENT_REDUCTIONS),
            ("llm_inputs", LLM_INPUTS),
            ("bridge", BRIDGES),
            ("token_projection", TOKEN_PROJECTIONS),
            ("encoder_window", ENCODER_WINDOWS),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: {', '.join(accepted)}.")
        if self.bridge == "aligner" and self.bridge_config is not None:
            raise ValueError("bridge_config is for the baselines; the aligner's settings are aligner_config.")
        if self.bridge == "ctc" and self.llm_inputs != "nearest":
            raise ValueError("llm_inputs: a CTC head predicts tokens, no embeddings; accepted: nearest.")
        self._validate_token_table()
        if self.speech_margin < 0:
            raise ValueError(f"speech_margin is {self.speech_margin}; accepted: 0 s or more.")
        if self.encoder_window == "audio" and not self.mask_speech_padding:
            raise ValueError("encoder_window is 'audio', which needs mask_speech_padding: where the audio ends.")
        if not 0 <= self.alignment_lambda <= 1:
            raise ValueError(f"alignment_lambda is {self.alignment_lambda}; accepted: 0 to 1.")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank is {self.lora_rank}; accepted: 0 (no LoRA) or more.")

    def _validate_token_table(self) -> None:
        """Raise `ValueError` where the settings of the aligner's table do not fit together."""
        names = ("aligner_prompt_tokens", "aligner_prompt")
        if self.token_projection == "linear":
            given = [name for name in names if getattr(self, name) is not None]
            if given or self.token_table_trained:
                raise ValueError(f"{(given or ['token_table_trained'])[0]} is for token_projection='table'.")
            return
        if self.bridge != "aligner":
            raise ValueError(f"token_projection is 'table', but the bridge {self.bridge!r} has no table.")
        if self.mixture_size < 1:
            raise ValueError(f"mixture_size is {self.mixture_size}; accepted: 1 or more.")
        unknown = [name for name in self.aligner_prompt or () if name not in (self.aligner_prompt_tokens or ())]
        if unknown:
            raise ValueError(f"aligner_prompt holds {unknown[0]!r}, which is not among aligner_prompt_tokens.")

    @property
    def pad_token_id(self) -> int:
        """Return the id that pads transcripts, which trainers of transformers look for here: the language model's."""
        pad = getattr(self.get_text_config(), "pad_token_id", None)
        return self.eoa_token_id if pad is None else pad

    @pad_token_id.setter
    def pad_token_id(self, value: int | None) -> None:
        text_config: Any = self.get_text_config()
        text_config.pad_token_id = value

    @property
    def max_alignment_tokens(self) -> int:
        """Return how many tokens of an utterance the aligner has positions for, `<EOA>` included."""
        aligner: Any = self.aligner_config
        return aligner.max_target_positions - 1 - len(self.aligner_prompt or ())


def _check_counts(values: dict, names: str = "") -> None:
    """Raise `ValueError` for a number of layers or labels beyond any model, of which a config would make long lists."""
    for name, value in values.items():
        if isinstance(value, dict):
            _check_counts(value, f"{names}{name}.")
        elif ("layers" in str(name) or name == "num_labels") and isinstance(value, int) and value > MOST_LAYERS:
            raise ValueError(f"config.json: {names}{name} is {value}; accepted: up to {MOST_LAYERS}.")


def _with_new_names(config_dict: dict) -> dict:
    """Return the config with the bridge by its name in what a quantized checkpoint keeps in full: it was `aligner`."""
    quantization_config = config_dict.get("quantization_config")
    if not isinstance(quantization_config, dict):
        return config_dict
    kept = {
        name: ["bridge" if part == "aligner" else part for part in quantization_config[name]]
        for name in KEPT_FIELDS
        if quantization_config.get(name)
    }
    return config_dict | {"quantization_config": quantization_config | kept}


SeamConfig.register_for_auto_class()  # saving a config also copies this file, so that it loads without the package
AutoConfig.register(SeamConfig.model_type, SeamConfig, exist_ok=True)
# `transformers serve` knows by this table of names, not by `auto_map`, which models take audio and write text.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(SeamConfig.model_type, "SeamForSpeechRecognition")
