"""From files to a model and back: backbones, checkpoints whole and light, and LoRA folded in."""

import copy
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from .backbones import (
    LLM,
    FullLLM,
    in_full,
    llm_options,
    load_backbone,
    load_embedding_table,
    load_llm_of,
    settle,
)
from .bridges import CTCHead, build_bridge
from .weights import (
    HUB_ARGUMENTS,
    OLD_NAMES,
    WEIGHT_FILES,
    backbone_folder,
    backbone_record,
    check_finite,
    check_generation_config,
    read_fingerprint,
    weight_files,
)

CODE = Path(__file__).parent
MODEL_CLASS = "modeling_seam/modeling_seam.SeamForSpeechRecognition"
AUTO_CLASSES = ("AutoModel", "AutoModelForMultimodalLM", "AutoModelForSpeechSeq2Seq")
PIPELINES = {
    "automatic-speech-recognition": {
        "impl": "modeling_seam/pipeline.SeamPipeline",
        "pt": ["AutoModelForSpeechSeq2Seq"],
    }
}
# When the language model is quantized.
KEPT_IN_FULL = ("encoder", "bridge", "draft_head", "lm_head", r".*\.lora_[AB]\.default")
FROM_DECODER = ("embed_positions", "layers", "layer_norm")  # what the aligner and a Whisper decoder have in common
# With another number of heads the same weights compute something else.
DECODER_SIZES = ("decoder_layers", "d_model", "decoder_ffn_dim", "decoder_attention_heads", "max_target_positions")
STAGING = ".saving"  # beside the files that it replaces, so that moving them is a rename


class SeamCheckpointMixin:
    """Loading and saving of [`SeamForSpeechRecognition`]."""

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Nothing: transformers would copy the code into one flat folder on saving; `save_pretrained` keeps its own."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        config=None,
        encoder: str | None = None,
        llm: str | None = None,
        llm_dtype: str | None = None,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """
        As in transformers, but stricter: every weight is accounted for.

        Args:
            encoder, llm: folders or Hub ids to take a light checkpoint's backbones from, instead of those in its
                config.
            llm_dtype: `"bfloat16"` or `"4bit"`: precision of the frozen LLM, to train LoRA (in `dtype`, as everything
                else) on it with less memory. `save_pretrained` writes the LLM as it lies in the files that it was read
                from. Stage 1 alone has no LLM: `add_llm` takes the same argument.

        Raises:
            ValueError: when a weight is missing, unexpected, of another shape, or not finite, or when a weight file is
                damaged or belongs to another checkpoint.
            OSError: when files are not to be had.
        """
        name = pretrained_model_name_or_path
        kwargs.pop("ignore_mismatched_sizes", None)
        if name is None:  # weights given as `state_dict`
            return super().from_pretrained(
                name, *args, config=config, output_loading_info=output_loading_info, **kwargs
            )
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        if llm_dtype is not None and kwargs.get("quantization_config") is not None:
            raise ValueError("llm_dtype and quantization_config: give one of the two.")
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _for_the_llm_only(kwargs["quantization_config"])
        saved = config if isinstance(config, PreTrainedConfig) else cls.config_class.from_pretrained(name, **hub)
        check_generation_config(name, **hub)
        fingerprint, stored = read_fingerprint(weight_files(name, **hub))
        if saved.light_checkpoint:
            given = {"encoder": encoder, "llm": llm}
            model, info = cls._from_light(name, saved, stored, given, llm_dtype, hub, kwargs), {}
        elif encoder is not None or llm is not None:
            raise ValueError(f"{name} is no light checkpoint: it holds its own encoder and LLM.")
        else:
            kwargs = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
            if llm_dtype is None or saved.alignment_only:
                kwargs["key_mapping"] = OLD_NAMES | (kwargs.get("key_mapping") or {})
                model, info = super().from_pretrained(name, *args, config=config, **kwargs)
                # transformers would save under the names that it has read.
                model._weight_conversions = [one for one in model._weight_conversions if not _is_old_name(one)]
            else:
                model, info = cls._with_held_llm(name, saved, stored, llm_dtype, hub, kwargs)
            for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                if info[problem]:
                    names = ", ".join(sorted(str(key) for key in info[problem])[:3])
                    raise ValueError(
                        f"{name} does not fit its config: {len(info[problem])} {problem.replace('_', ' ')} ({names})."
                    )
        check_finite(model, stored)
        if saved.weights_fingerprint not in (None, fingerprint):
            files = ", ".join(sorted({tensor.file.name for tensor in stored.values()}))
            raise ValueError(
                f"{name}: {files} is not the weight file that config.json was saved with (another fingerprint); it was "
                "swapped or changed."
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def _with_held_llm(cls, name, config, stored, llm_dtype, hub, kwargs):
        """A whole checkpoint, read as if it were Stage 1 alone; then its LLM, straight into `llm_dtype`."""
        place = kwargs.get("device_map") or "cpu"
        if isinstance(place, dict) and len(place) > 1:
            raise ValueError("llm_dtype: a model with its LLM in less precision is loaded to one device.")
        options = llm_options(llm_dtype, torch.float32, place[""] if isinstance(place, dict) else place)
        if kwargs.get("attn_implementation") is not None:
            options["attn_implementation"] = kwargs["attn_implementation"]
        language_model, table = load_llm_of(config.get_text_config(), stored, **options)
        weights = {name: tensor.read() for name, tensor in stored.items() if not name.startswith(LLM)}
        weights[f"{LLM}embed_tokens.weight"] = table
        config = copy.deepcopy(config)
        config.alignment_only = True
        model, info = super().from_pretrained(None, config=config, state_dict=weights, **kwargs)
        table = model.get_input_embeddings().weight
        config = model.config
        config.alignment_only = False
        model._put_in(language_model)
        language_model.generation_config = GenerationConfig.from_model_config(config.get_text_config())
        model._hold(weight_files(name, **hub), table)
        adapters = {name: tensor.read() for name, tensor in stored.items() if ".lora_" in name}
        own = {key for key in model.state_dict() if ".lora_" in key}
        info["missing_keys"] = {*info["missing_keys"], *(own - set(adapters))}
        info["unexpected_keys"] = {*info["unexpected_keys"], *(set(adapters) - own)}
        model.load_state_dict(adapters, strict=False)
        model.generation_config = GenerationConfig.from_pretrained(name, **hub)
        return model.to(table.device).eval(), info

    def _hold(self, files: list[Path], table: torch.Tensor):
        """
        Remember where the LLM, which has been put in in less precision, lies in full; LoRA is as precise as the rest.

        Args:
            files: its weight files.
            table: its embedding table in full: Stage 1 goes on with that where the one that is held is rounded.
        """
        self.full_llm = FullLLM(self.language_model, files)
        settle(self.language_model)
        dtype = self.encoder.conv1.weight.dtype
        for name, parameter in self.language_model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(dtype)
        held = self.get_input_embeddings().weight
        pieces = zip(held.detach().split(4096), table.detach().split(4096), strict=True)
        if not all(torch.equal(one.to(table), other) for one, other in pieces):
            self.full_table = table.detach().to(held.device)

    @classmethod
    def _from_light(cls, name, config, stored, given, llm_dtype, hub, kwargs):
        """The backbones of a light checkpoint, and what SEAM trained of its weight file."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict):
            raise ValueError("a light checkpoint is loaded to one device; save it whole to spread it over several.")
        place = {key: hub[key] for key in ("cache_dir", "local_files_only", "token") if key in hub}
        folders = {
            role: backbone_folder(role, (config.backbones or {}).get(role) or {}, given[role], **place)
            for role in ("encoder", "llm")
        }
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        dtype = config.dtype if dtype in (None, "auto") else dtype
        config.dtype = dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        options = {key: kwargs[key] for key in ("attn_implementation", "device_map") if kwargs.get(key) is not None}
        whisper = load_backbone(AutoModel, folders["encoder"], dtype, r"^encoder\.", **options)
        if kwargs.get("quantization_config") is not None:
            options["quantization_config"] = kwargs["quantization_config"]
        if config.alignment_only:
            language_model = load_embedding_table(folders["llm"], dtype)
        else:
            options |= llm_options(llm_dtype, dtype, whisper.device)
            language_model = load_backbone(AutoModelForCausalLM, folders["llm"], expected="", **options)
        config.light_checkpoint = False
        model = cls._assemble(config, whisper, language_model, dtype)
        if llm_dtype is not None and not config.alignment_only:
            table = load_embedding_table(folders["llm"], dtype).embed_tokens.weight
            model._hold(weight_files(folders["llm"]), table.to(whisper.device))
        weights = {name: tensor.read() for name, tensor in stored.items()}
        own = {key for key in model.state_dict() if _is_own(key)}
        if set(weights) != own:
            odd = sorted(set(weights) ^ own)
            raise ValueError(f"{name} does not fit its config: {len(odd)} missing or unexpected keys ({odd[0]}).")
        model.load_state_dict(weights, strict=False)
        model.generation_config = GenerationConfig.from_pretrained(name, **hub)
        return model.to(whisper.device).eval()

    @classmethod
    def _assemble(cls, config, whisper, language_model, dtype: torch.dtype):
        """A model around two loaded backbones, with a fresh aligner and fresh LoRA."""
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

    def _put_in(self, language_model):
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

    @classmethod
    def from_backbones(
        cls,
        encoder: str,
        llm: str,
        processor=None,
        dtype: torch.dtype = torch.float32,
        llm_dtype: str | None = None,
        aligner_from_decoder: bool = False,
        **config,
    ) -> "SeamCheckpointMixin":
        """
        Build a model around two pretrained backbones, with a fresh aligner and fresh LoRA.

        Args:
            encoder: Hub id or folder of a Whisper-family checkpoint. Its decoder, if any, is left behind, unless:
            llm: Hub id or folder of a causal language model.
            processor ([`SeamProcessor`], *optional*): source of the token ids and of the default prompt.
            dtype: of all weights, the backbones' included.
            llm_dtype: see `from_pretrained`.
            aligner_from_decoder: the aligner begins with that decoder's layers, positions and final layer norm; its two
                projections are fresh.
            config: fields of [`SeamConfig`]. With `alignment_only=True` the LLM's embedding table is all that is read
                of it: `add_llm` puts in the rest.

        Raises:
            ValueError: when a backbone's weights are not all found in its checkpoint, the parts do not fit, a field is
                unknown, or `aligner_from_decoder` and the aligner has other sizes than the decoder.
        """
        unknown = sorted(set(config) - {field.name for field in fields(cls.config_class)})
        if unknown:
            raise ValueError(f"SeamConfig has no field {unknown[0]!r}.")
        if processor is not None:
            vocab_size = AutoConfig.from_pretrained(llm).get_text_config().vocab_size
            config = {
                "boa_token_id": processor.boa_token_id,
                "eoa_token_id": processor.eoa_token_id,
                "audio_token_id": processor.audio_token_id,
                "prompt_token_ids": processor.prompt_ids(),
                "lookup_excluded_ids": processor.lookup_excluded_ids(vocab_size),
                **config,
            }
        # Whisper's encoder class, asked for by name on a full checkpoint, would come back random.
        needed = rf"^(encoder|decoder\.({'|'.join(FROM_DECODER)}))\." if aligner_from_decoder else r"^encoder\."
        whisper = load_backbone(AutoModel, encoder, dtype, needed)
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
        config = cls.config_class.from_backbones(whisper.config, text_config, **config)
        if aligner_from_decoder:
            _check_decoder_fits(whisper.config, config)
        model = cls._assemble(config, whisper, language_model, dtype)
        if llm_dtype is not None and not config.alignment_only:
            model._hold(weight_files(llm), load_embedding_table(llm, dtype).embed_tokens.weight)
        if aligner_from_decoder:
            for name in FROM_DECODER:
                weights = getattr(whisper.get_decoder(), name).state_dict()
                getattr(model.bridge, name).load_state_dict(weights)
        model.generation_config = GenerationConfig(
            max_new_tokens=config.aligner_config.max_target_positions - 1,
            num_beams=1,  # said, for pipelines would choose 5
            do_sample=False,
            eos_token_id=language_model.generation_config.eos_token_id,
            pad_token_id=language_model.generation_config.pad_token_id,
        )
        model.warn_if_eoa_is_ambiguous()
        return model

    def add_llm(self, llm: str | None = None, llm_dtype: str | None = None) -> "SeamCheckpointMixin":
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
        table = self.get_input_embeddings().weight
        options = llm_options(llm_dtype, table.dtype, table.device)
        language_model = load_backbone(AutoModelForCausalLM, llm, expected="", **options).to(table.device)
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
            self._hold(weight_files(llm), table)
        return self

    def add_mask_embedding(self) -> "SeamCheckpointMixin":
        """Begin a learned mask (Stage 3) at zero, in place: a frozen `mask_embedding` beside the embedding table."""
        table, dtype = self.get_input_embeddings().weight, self.encoder.conv1.weight.dtype
        self.mask_embedding = torch.nn.Parameter(table.new_zeros(table.shape[1], dtype=dtype), requires_grad=False)
        self.config.learned_mask = True
        return self

    def add_draft_head(self, token_ids: Iterable[int]) -> "SeamCheckpointMixin":
        """
        Begin a draft for Stage 1, in place: a fresh, frozen CTC head on the encoder that can write `token_ids`, in the
        place of an older one. Raises `ValueError` for ids that `SeamConfig.draft_vocabulary` cannot hold.
        """
        config = copy.copy(self.config)
        config.draft_vocabulary = sorted(set(token_ids))
        config.validate_architecture()
        self.config.draft_vocabulary = config.draft_vocabulary
        head = CTCHead(config.audio_config.d_model, config.draft_vocabulary).requires_grad_(False)
        weight = self.bridge.input_projection.weight  # as precise as what it drafts for
        self.draft_head = head.to(weight.device, weight.dtype)
        return self

    def save_pretrained(
        self, save_directory, is_main_process: bool = True, push_to_hub: bool = False, light: bool = False, **kwargs
    ):
        """
        As in transformers, and: the code is saved too, so that the folder loads where this package is not installed;
        everything is written aside first and then moved, so that an interrupted save leaves the old files usable.

        Args:
            light (`bool`, *optional*, defaults to `False`):
                Save the aligner, draft head, LoRA and learned mask only; the backbones stay where `config.backbones`
                says.

        Raises:
            ValueError: when `light` and the config does not say where the backbones are, or for a `variant`.
        """
        if kwargs.get("variant") is not None:
            raise ValueError("variant: a folder holds one set of weights; save the other to a folder of its own.")
        if kwargs.get("distributed_checkpoint"):  # every rank writes its own share
            return super().save_pretrained(
                save_directory, is_main_process=is_main_process, push_to_hub=push_to_hub, **kwargs
            )
        if self.full_llm is not None:
            kwargs["state_dict"] = self.full_llm.put_into(kwargs.get("state_dict") or self.state_dict())
        if light:
            if self.config.backbones is None or not (self.config.lora_rank or self.config.alignment_only):
                raise ValueError(
                    "a light checkpoint needs LoRA (lora_rank above 0) and backbones of the Hub (config.backbones)."
                )
            state_dict = kwargs.get("state_dict") or self.state_dict()
            kwargs["state_dict"] = {key: value for key, value in state_dict.items() if _is_own(key)}
        target = Path(save_directory)
        staging = target / STAGING
        if is_main_process:
            shutil.rmtree(staging, ignore_errors=True)  # of a save that was interrupted
        self.config.auto_map = dict.fromkeys(AUTO_CLASSES, MODEL_CLASS)
        self.config.custom_pipelines = PIPELINES
        super().save_pretrained(staging, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            _save_fingerprint(staging, light)
            shutil.copytree(
                CODE,
                staging / CODE.name,
                ignore=lambda _, names: [n for n in names if not n.endswith(".py") or n == "__init__.py"],
            )
            _move_over(staging, target)
        if push_to_hub and is_main_process:
            self.push_to_hub(kwargs.pop("repo_id", target.name), **_push_arguments(kwargs))

    def merge_lora(self) -> "SeamCheckpointMixin":
        """
        Fold LoRA into the language model's weights, in place: the same transcripts, without adapters. Raises
        `ValueError` for Stage 1 alone, which has none yet, and for an LLM that is held in less precision.
        """
        if self.full_llm is not None:
            raise ValueError("the LLM is held in less precision than it is saved in: load it without llm_dtype first.")
        if self.config.alignment_only:
            raise ValueError("this model holds Stage 1 alone: it has no LoRA to fold in.")
        if self.config.lora_rank:
            take_off_lora(self.language_model, fold_in=True)
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
        language_model._hf_peft_config_loaded = True
    return language_model


def save_lora(language_model: PreTrainedModel, folder: Path) -> None:
    """Write the LoRA adapters as a folder that `peft` loads onto the language model."""
    folder.mkdir(parents=True)
    weights = get_peft_model_state_dict(language_model)
    weights = {f"base_model.model.{key}": weight.contiguous() for key, weight in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    language_model.peft_config["default"].save_pretrained(folder)
    language_model.generation_config.save_pretrained(folder)


def take_off_lora(language_model: PreTrainedModel, fold_in: bool) -> None:
    """Remove the LoRA adapters, in place; `fold_in` adds them to the weights first."""
    for name, module in list(language_model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if fold_in:
                module.merge(safe_merge=True)  # refuses NaN
            language_model.set_submodule(name, module.get_base_layer())
    del language_model.peft_config
    language_model._hf_peft_config_loaded = False


def _check_decoder_fits(whisper_config, config):
    """Raises `ValueError` when the aligner cannot begin with the weights of this Whisper's decoder."""
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


def _for_the_llm_only(quantization_config):
    """A copy that leaves out the encoder and what was trained in full precision, unless the user chose otherwise."""
    quantization_config = copy.deepcopy(quantization_config)
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if getattr(quantization_config, name, ()) is None:
            setattr(quantization_config, name, list(KEPT_IN_FULL))
    return quantization_config


def _is_old_name(conversion) -> bool:
    """Whether transformers' record of a renamed weight is one of `OLD_NAMES`."""
    return any(pattern in OLD_NAMES for pattern in conversion.source_patterns)


def _is_own(key: str) -> bool:
    """Whether a weight is part of a light checkpoint: what SEAM trains."""
    return key.startswith(("bridge.", "draft_head.")) or ".lora_" in key or key == "mask_embedding"


def _save_fingerprint(folder: Path, light: bool):
    """Write into the saved config what weights lie beside it."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["weights_fingerprint"] = read_fingerprint(weight_files(folder))[0]
    config["light_checkpoint"] = light
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _move_over(staging: Path, target: Path):
    """Move finished files over older ones, and remove weight files of the older save that have no successor."""
    new = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
    if (target / CODE.name).is_symlink():  # to code that is another's: not to be written through
        (target / CODE.name).unlink()
    stale = {path.name for path in target.glob(WEIGHT_FILES)} - {path.name for path in new}
    for path in new:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / path, target / path)
    for name in stale:
        (target / name).unlink()
    shutil.rmtree(staging)


def _push_arguments(kwargs: dict) -> dict:
    accepted = ("commit_message", "private", "token", "revision", "create_pr", "max_shard_size")
    return {key: kwargs[key] for key in accepted if key in kwargs}
