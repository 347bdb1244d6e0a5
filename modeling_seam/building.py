"""Building a model from pretrained backbones, and what is put in later: the LLM, LoRA, a learned mask, a draft head."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from .backbones import StoredLLM, in_full, keep_layout, llm_options, load_backbone, load_embedding_table
from .bridges import CTCHead, build_bridge
from .token_table import WhisperPrompt, rewritten_table
from .weights import backbone_folder, backbone_record, weight_files

FROM_DECODER = ("embed_positions", "layers", "layer_norm")  # what the aligner and a Whisper decoder have in common
# Above this cosine, EOA and another returnable token can hardly be distinguished by the lookup.
EOA_COSINE_LIMIT = 0.98
# With another number of heads the same weights compute something else.
DECODER_SIZES = ("decoder_layers", "d_model", "decoder_ffn_dim", "decoder_attention_heads", "max_target_positions")

if TYPE_CHECKING:
    MixedInto = PreTrainedModel
else:
    MixedInto = object


class OwnAdapters(dict):
    """
    The configs of a model's own LoRA, `peft_config`, which PEFT reads before it adds an adapter.

    It is refused there, before a layer is touched: under the name of the first one it would overwrite trained weights,
    under any other it would switch them off.
    """

    def __setitem__(self, name, adapter):
        """Add the first adapter, and refuse a second one."""
        if self:
            raise ValueError(
                f"adapter {name!r}: the model has LoRA of its own, which another adapter would overwrite or switch "
                "off; fold it into the weights first (merge_lora), then add yours."
            )
        super().__setitem__(name, adapter)

    def update(self, adapters):  # type: ignore[override]  # PEFT gives a mapping
        """Add adapters as `__setitem__` does."""
        for name, adapter in adapters.items():
            self[name] = adapter


class LanguageModelsAdapters:
    """The attribute `peft_config`, if the language model has LoRA: PEFT looks at the model that it is given."""

    def __get__(self, model, owner=None):
        """Return the language model's; whatever PEFT sets on the model itself comes before it."""
        return self if model is None else model.language_model.peft_config


class SeamBuildingMixin(MixedInto):
    """Building of [`SeamForSpeechRecognition`] from its parts."""

    peft_config = LanguageModelsAdapters()

    if TYPE_CHECKING:  # what that class has
        config: Any
        config_class: Any
        encoder: Any
        bridge: Any
        language_model: Any
        mask_embedding: nn.Parameter | None
        draft_head: CTCHead | None
        stored_llm: StoredLLM | None
        full_table: torch.Tensor | None
        freeze: Callable[[], None]
        warn_if_eoa_is_ambiguous: Callable[[], None]

    @classmethod
    def from_backbones(
        cls,
        encoder: str,
        llm: str,
        processor=None,
        dtype: torch.dtype = torch.float32,
        llm_dtype: str | None = None,
        aligner_from_decoder: bool = False,
        language: str | None = None,
        **config,
    ) -> Self:
        """
        Build a model around two pretrained backbones, with a fresh bridge and fresh LoRA.

        With `token_projection="table"` nothing is fresh but LoRA, which begins as nothing: the aligner is Whisper's
        decoder with its table re-written, and transcribes without training.

        Args:
            encoder: Hub id or folder of a Whisper-family checkpoint. Its decoder, if any, is left out, unless
                `aligner_from_decoder`.
            llm: Hub id or folder of a causal language model.
            processor ([`SeamProcessor`], *optional*): source of the token ids and of the default prompt.
            dtype: of all weights, the backbones' included.
            llm_dtype: see `from_pretrained`.
            aligner_from_decoder: begin the aligner with that decoder's layers, positions and final layer norm; its two
                projections are fresh. With `token_projection="table"` it always does.
            language: which the aligner expects by default, where it is a multilingual Whisper's decoder; `"en"` if none
                is given. Only with `token_projection="table"`.
            config: fields of [`SeamConfig`]. With `alignment_only=True` only the LLM's embedding table is read;
                `add_llm` puts in the rest.

        Raises:
            ValueError: when a backbone's weights are not all found in its checkpoint, the parts do not fit, a field is
                unknown, the aligner begins as a decoder of other sizes than its own, or a vocabulary is of a kind whose
                table cannot be re-written.
        """
        unknown = sorted(set(config) - {field.name for field in fields(cls.config_class)})
        if unknown:
            raise ValueError(f"SeamConfig has no field {unknown[0]!r}.")
        if processor is not None:
            config = _token_ids(processor, llm) | config
        has_table = config.get("token_projection") == "table"
        if has_table:
            prompt = WhisperPrompt.of(GenerationConfig.from_pretrained(encoder), language)
            # The row of the prompt's last token is that of <BOA>.
            config |= {"aligner_prompt": prompt.default[:-1], "aligner_prompt_tokens": list(prompt.ids)}
        elif language is not None:
            raise ValueError("language is for token_projection='table': Eq. 2's projections begin with none.")
        # Whisper's encoder class, asked for by name on a full checkpoint, would come back random.
        from_decoder = [*FROM_DECODER] * (aligner_from_decoder or has_table) + ["embed_tokens"] * has_table
        needed = rf"^(encoder|decoder\.({'|'.join(from_decoder)}))\." if from_decoder else r"^encoder\."
        whisper = load_backbone(AutoModel, encoder, dtype, needed)
        language_model: Any
        if config.get("alignment_only"):
            language_model = load_embedding_table(llm, dtype)
        else:
            options = llm_options(llm_dtype, dtype, whisper.device)
            language_model = load_backbone(AutoModelForCausalLM, llm, expected="", **options)
        for backbone in (whisper.config, language_model.config):
            backbone._name_or_path = ""  # a folder of one machine; Hub ids are kept as `backbones`
        text_config = language_model.config if llm_dtype is None else in_full(language_model.config, dtype)
        records = {"encoder": backbone_record(encoder), "llm": backbone_record(llm)}
        config.setdefault("backbones", records if all(records.values()) else None)
        seam_config: Any = cls.config_class.from_backbones(whisper.config, text_config, **config)
        if from_decoder:
            _check_decoder_fits(whisper.config, seam_config)
        model = cls._assemble(seam_config, whisper, language_model, dtype)
        if llm_dtype is not None and not seam_config.alignment_only:
            model._keep_stored_llm(weight_files(llm), load_embedding_table(llm, dtype).embed_tokens.weight)
        if from_decoder:
            for name in FROM_DECODER:
                weights = getattr(whisper.get_decoder(), name).state_dict()
                getattr(model.bridge, name).load_state_dict(weights)
        if has_table:
            model._rewrite_token_table(whisper, encoder, llm)
        model.generation_config = GenerationConfig(
            max_new_tokens=seam_config.max_alignment_tokens,
            num_beams=1,  # explicit: pipelines would choose 5
            do_sample=False,
            eos_token_id=language_model.generation_config.eos_token_id,
            pad_token_id=language_model.generation_config.pad_token_id,
        )
        model.warn_if_eoa_is_ambiguous()
        return model

    @classmethod
    def _assemble(cls, config, whisper: PreTrainedModel, language_model: nn.Module, dtype: torch.dtype) -> Self:
        """Build a model around two loaded backbones, with a fresh bridge and fresh LoRA."""
        with torch.device("meta"):  # the shell only: every part is put in below
            model = cls(config)
        model.encoder = whisper.get_encoder().requires_grad_(False)
        model.bridge = build_bridge(config).to(dtype)
        model._put_in(language_model)
        if config.learned_mask:
            model.add_mask_embedding()
        if config.draft_vocabulary is not None:
            model.add_draft_head(config.draft_vocabulary)
        return model

    def _rewrite_token_table(self, whisper: Any, encoder: str, llm: str) -> None:
        """
        Give the aligner's tokens the rows of Whisper's (see `rewritten_table`), in place.

        Args:
            whisper: the encoder checkpoint with its decoder.
            encoder, llm: Hub ids or folders of both backbones, which have the tokenizers.
        """
        table = rewritten_table(
            whisper.get_decoder().embed_tokens.weight,
            AutoTokenizer.from_pretrained(encoder),
            AutoTokenizer.from_pretrained(llm),
            self.config,
            WhisperPrompt.of(GenerationConfig.from_pretrained(encoder), None),
        )
        self.bridge.token_table.weight.data.copy_(table)

    def _put_in(self, language_model: Any) -> None:
        """Take a loaded language model, or its embedding table, as this model's."""
        # A chat model's own settings sample; a transcript is decoded greedily unless asked otherwise.
        chat = language_model.generation_config
        language_model.generation_config = GenerationConfig(
            eos_token_id=chat.eos_token_id,
            pad_token_id=self.config.eoa_token_id if chat.pad_token_id is None else chat.pad_token_id,
        )
        if not self.config.alignment_only:
            with_lora(language_model, self.config)
        self.language_model = language_model.requires_grad_(False)

    def _keep_stored_llm(self, files: list[Path], table: torch.Tensor) -> None:
        """
        Remember where the LLM, which has been put in in less precision, lies in full; LoRA is as precise as the rest.

        Args:
            files: its weight files.
            table: its embedding table in full: Stage 1 goes on with that where the LLM's own is rounded.
        """
        self.stored_llm = StoredLLM(self.language_model, files)
        keep_layout(self.language_model)
        dtype = self.encoder.conv1.weight.dtype
        for name, parameter in self.language_model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(dtype)
        own = self.language_model.get_input_embeddings().weight
        pieces = zip(own.detach().split(4096), table.detach().split(4096), strict=True)
        if not all(torch.equal(one.to(table), other) for one, other in pieces):
            self.full_table = table.detach().to(own.device)

    def add_llm(self, llm: str | None = None, llm_dtype: str | None = None) -> Self:
        """
        Put the LLM, with fresh LoRA, in the place of the embedding table that Stage 1 was trained with, in place.

        Args:
            llm: Hub id or folder; by default the one of `config.backbones`.
            llm_dtype: see `from_pretrained`.

        Raises:
            ValueError: when the model has its LLM already, none is named, or it is not the one of the table.
        """
        if not self.config.alignment_only:
            raise ValueError("this model holds its LLM already.")
        record = (self.config.backbones or {}).get("llm")
        if record is not None:
            llm = backbone_folder("llm", record, llm)
        elif llm is None:
            raise ValueError(
                "this model holds Stage 1 alone, and its config does not say which LLM it is for: name it."
            )
        table = self.language_model.get_input_embeddings().weight
        options = llm_options(llm_dtype, table.dtype, table.device)
        language_model: Any = load_backbone(AutoModelForCausalLM, llm, expected="", **options).to(table.device)
        own = language_model.get_input_embeddings().weight
        if llm_dtype is not None:  # it is rounded: compare what it was
            own = load_embedding_table(llm, table.dtype).embed_tokens.weight.to(table.device)
        if not torch.equal(own, table):
            raise ValueError(f"{llm} is not the LLM that Stage 1 was trained with: its embedding table is another.")
        language_model.config._name_or_path = ""
        config = language_model.config
        self.config.text_config = config if llm_dtype is None else in_full(config, table.dtype)
        self.config.alignment_only = False
        self._put_in(language_model)
        if llm_dtype is not None:
            self._keep_stored_llm(weight_files(llm), table)
        return self

    def add_mask_embedding(self) -> Self:
        """Begin a learned mask (Stage 3) at zero, in place: a frozen `mask_embedding` beside the embedding table."""
        table, dtype = self.language_model.get_input_embeddings().weight, self.encoder.conv1.weight.dtype
        self.mask_embedding = nn.Parameter(table.new_zeros(table.shape[1], dtype=dtype), requires_grad=False)
        self.config.learned_mask = True
        return self

    def add_draft_head(self, token_ids: Iterable[int]) -> Self:
        """
        Begin a draft for Stage 1, in place: a fresh, frozen CTC head on the encoder, instead of an older one.

        Args:
            token_ids: those that it can output.

        Raises:
            ValueError: for ids that `SeamConfig.draft_vocabulary` does not accept.
        """
        config = copy.copy(self.config)
        config.draft_vocabulary = sorted(set(token_ids))
        config.validate_architecture()
        self.config.draft_vocabulary = config.draft_vocabulary
        head = CTCHead(config.audio_config.d_model, config.draft_vocabulary).requires_grad_(False)
        weight = self.bridge.layer_norm.weight  # as precise as what it drafts for
        self.draft_head = head.to(weight.device, weight.dtype)
        return self

    def merge_lora(self) -> Self:
        """
        Fold LoRA into the language model's weights, in place: the same transcripts, without adapters.

        Raises:
            ValueError: for Stage 1 alone, which has none yet, and for an LLM in less precision than its files.
        """
        if self.stored_llm is not None:
            raise ValueError("the LLM is in less precision than it is saved in: load it without llm_dtype first.")
        if self.config.alignment_only:
            raise ValueError("this model holds Stage 1 alone: it has no LoRA to fold in.")
        if self.config.lora_rank:
            remove_lora(self.language_model, fold_in=True)
            self.config.lora_rank = 0
        return self


def with_lora(language_model: PreTrainedModel, config) -> PreTrainedModel:
    """Add the LoRA adapters of the config (Section 4.2), in place. They must exist before weights are loaded."""
    if config.lora_rank:
        adapter = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=list(config.lora_target_modules),
            base_model_name_or_path=language_model.name_or_path,
        )
        # As `language_model.add_adapter` does, which refuses any peft older than the newest: transformers 5.24 one that
        # is not released.
        inject_adapter_in_model(adapter, language_model)
        language_model.peft_config = OwnAdapters(language_model.peft_config)
        language_model._hf_peft_config_loaded = True
    return language_model


def remove_lora(language_model: Any, fold_in: bool) -> None:
    """Remove the LoRA adapters, in place; `fold_in` adds them to the weights first."""
    for name, module in list(language_model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if fold_in:
                module.merge(safe_merge=True)  # refuses NaN
            language_model.set_submodule(name, module.get_base_layer())
    del language_model.peft_config
    language_model._hf_peft_config_loaded = False


@dataclass(frozen=True)
class BoundaryTokens:
    """
    The tokens that begin and end Stage 1.

    Args:
        boa, eoa: names of `<BOA>` and `<EOA>` in the language model's vocabulary.
        reason: why these.
    """

    boa: str
    eoa: str
    reason: str


def choose_boundary_tokens(llm: str) -> BoundaryTokens:
    """
    Choose `<BOA>` and `<EOA>` among the special tokens of a language model, by looking at its embedding table.

    `<EOA>` is the token that ends the model's own turns, if no other embedding is nearly the same: some models were
    hardly trained on theirs. Otherwise it is the special token that is most unlike all others.

    Args:
        llm: Hub id or folder.

    Raises:
        ValueError: when there are not two special tokens with an embedding.
    """
    tokenizer = AutoTokenizer.from_pretrained(llm)
    table = load_embedding_table(llm, torch.float32).embed_tokens.weight.detach()
    special = sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
    special = [i for i in special if i < len(table) and table[i].any()]
    if len(special) < 2:
        raise ValueError(f"{llm} has {len(special)} special tokens; <BOA> and <EOA> have to be two.")
    directions = nn.functional.normalize(table, dim=-1)
    # One by one: some vocabularies have thousands of them.
    closest = {i: float((directions @ directions[i]).index_fill(0, torch.tensor(i), -1).amax()) for i in special}
    eoa, own = min(closest, key=closest.__getitem__), tokenizer.eos_token_id
    names: Any = tokenizer.convert_ids_to_tokens
    if closest.get(own, 1.0) <= EOA_COSINE_LIMIT:
        eoa = own
        reason = f"{names(eoa)} ends the model's turns, and no other embedding is nearer than cosine {closest[eoa]:.3f}"
    else:
        reason = f"{names(eoa)} has no nearer neighbour than cosine {closest[eoa]:.3f}"
        if own in closest:
            reason += f"; {names(own)}, which ends the model's turns, has one at {closest[own]:.3f}"
    usual = tokenizer.convert_tokens_to_ids("<|im_start|>")
    boa = usual if usual in closest and usual != eoa else next(i for i in special if i != eoa)
    return BoundaryTokens(names(boa), names(eoa), reason)


def _token_ids(processor, llm: str) -> dict[str, Any]:
    """Return the fields of a config that follow from the processor and the LLM's vocabulary."""
    vocab_size = AutoConfig.from_pretrained(llm).get_text_config().vocab_size
    return {
        "boa_token_id": processor.boa_token_id,
        "eoa_token_id": processor.eoa_token_id,
        "audio_token_id": processor.audio_token_id,
        "prompt_token_ids": processor.prompt_ids(),
        "vocabulary_fingerprint": processor.vocabulary_fingerprint(),
        "lookup_excluded_ids": processor.lookup_excluded_ids(vocab_size),
    }


def _check_decoder_fits(whisper_config, config) -> None:
    """Raise `ValueError` when the aligner cannot begin with the weights of this Whisper's decoder."""
    if config.bridge != "aligner":
        raise ValueError(
            f"aligner_from_decoder: the bridge {config.bridge!r} is no Whisper decoder; accepted: aligner."
        )
    aligner, decoder = (
        {name: getattr(one, name) for name in DECODER_SIZES} for one in (config.aligner_config, whisper_config)
    )
    if aligner != decoder:
        sizes = [", ".join(f"{name} {size}" for name, size in one.items()) for one in (aligner, decoder)]
        raise ValueError(
            f"aligner_from_decoder: aligner_config has {sizes[0]}; accepted: the sizes of the encoder checkpoint's "
            f"decoder, {sizes[1]}."
        )
