"""Weight files of a checkpoint: found, checked and fingerprinted. Safetensors only: nothing is unpickled."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
WEIGHT_FILES = "model*.safetensors*"  # with the index of shards: what a later save makes stale
# Elements of each tensor that its fingerprint samples: enough to tell two trainings apart, and read in no time.
SAMPLES = 64
# Names in weight files that were saved before the bridge was called so, as transformers' `key_mapping` takes them.
OLD_NAMES = {r"^aligner\.": "bridge."}


class StoredTensor(NamedTuple):
    """A tensor in a weight file, where its name may be an older one."""

    file: Path
    key: str

    def read(self) -> torch.Tensor:
        """Return the tensor, which is mapped: it takes memory when it is looked into."""
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(self.key)


def weight_files(name: str | Path, **hub) -> list[Path]:
    """
    Return the weight files of a folder or Hub id, downloading those that are not in the cache.

    Args:
        hub: `HUB_ARGUMENTS`, as of `from_pretrained`.

    Raises:
        OSError: when there are none. Weights in other formats than safetensors are not looked for.
        ValueError: when the index of the shards cannot be read.
    """
    single = _find(name, SAFE_WEIGHTS_NAME, **hub)
    if single is not None:
        return [single]
    index = _find(name, SAFE_WEIGHTS_INDEX_NAME, **hub)
    if index is None:
        raise OSError(f"{name} holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}, or cannot be reached.")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = {shard: _find(name, shard, **hub) for shard in shards if Path(shard).name == shard}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: it is no index of weight files.") from error
    for shard in shards:
        if files.get(shard) is None:
            raise OSError(f"{name} lacks {shard}, which {index.name} names.")
    return [file for file in files.values() if file is not None]


def check_generation_config(name: str | Path, **hub) -> None:
    """Raise `ValueError` for a damaged generation_config.json, which transformers would replace by defaults."""
    file = _find(name, GENERATION_CONFIG_NAME, **hub)
    try:
        damaged = file is not None and not isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except ValueError:
        damaged = True
    if damaged:
        raise ValueError(f"{file} is damaged: it is not a JSON object.")


def _find(name: str | Path, file: str, **hub) -> Path | None:
    found = cached_file(
        name,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    return None if found is None else Path(found)


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of the tensors' names, types, shapes and some of their values."""
    return _digest({key: _sample(tensor) for key, tensor in tensors.items()})


def _sample(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    values = tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLES)]
    return str(tensor.dtype), tuple(tensor.shape), values.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _digest(seen: dict[str, tuple[str, tuple[int, ...], bytes]]) -> str:
    digest = hashlib.sha256()
    for key, (dtype, shape, values) in sorted(seen.items()):
        digest.update(f"{key} {dtype} {shape} ".encode() + values)
    return digest.hexdigest()


def read_fingerprint(files: list[Path]) -> tuple[str, dict[str, StoredTensor]]:
    """
    Return the fingerprint of weight files, and where each tensor lies.

    The fingerprint is of the names in the files; the other keys are the tensors' names in the model (see `OLD_NAMES`).

    Raises:
        ValueError: for a file that is cut off or no safetensors file, by its name.
    """
    seen, stored = {}, {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():
                    seen[key] = _sample(opened.get_tensor(key))  # mapped, not read: only the samples are
                    stored[new_name(key)] = StoredTensor(file, key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"the weight file {file} is damaged: {error}") from error
    return _digest(seen), stored


def new_name(key: str) -> str:
    """Return the name that a weight has in the model, whose name in a file may be an older one (see `OLD_NAMES`)."""
    for pattern, name in OLD_NAMES.items():
        key = re.sub(pattern, name, key)
    return key


def check_finite(model: nn.Module, stored: dict[str, StoredTensor]) -> None:
    """Raise `ValueError` that names the file for a loaded weight that holds NaN or infinite values."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
            file = stored[name].file if name in stored else ""
            raise ValueError(f"the weight file {file} is damaged: {name} holds NaN or infinite values.")


TOKEN_TABLE = "bridge.token_table.weight"


def is_trained_by_seam(name: str, config) -> bool:
    """Return whether a weight is one that SEAM trained, and thus part of a light checkpoint."""
    if name == TOKEN_TABLE:
        return config.token_table_trained  # otherwise it is made of the backbones
    return name.startswith(("bridge.", "draft_head.")) or ".lora_" in name or name == "mask_embedding"


# In a folder that was converted from a package: of which repository of the Hub its weights are.
BACKBONE_RECORD = "seam_backbone.json"


def packaged_folder(hub_id: str) -> Path:
    """Return where `seam backbones` lays down a backbone, in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "seam" / "backbones" / hub_id.split("/")[1]


def backbone_record(name: str) -> dict[str, str] | None:
    """Return Hub id, commit and fingerprint of a backbone for a config; `None` for a folder, which others lack."""
    if Path(name).exists():
        return None
    files = weight_files(name)
    return {"id": name, "revision": files[0].parent.name, "fingerprint": read_fingerprint(files)[0]}


def backbone_folder(role: str, record: dict, given: str | None, **hub) -> str:
    """
    Return where a light checkpoint's backbone lies.

    It is the folder or id that the user named, or the snapshot of the Hub id in the config, never a path in the config.

    Args:
        role: `"encoder"` or `"llm"`.
        record: see `backbone_record`.
        given: folder or id that the user named instead.
        hub: `cache_dir`, `local_files_only`, `token`.

    Raises:
        OSError: when it cannot be found or downloaded.
        ValueError: when the config names no Hub id and commit, or the weights are not those of the training.
    """
    if given is not None:
        folder = given
    else:
        try:
            validate_repo_id(record["id"])
            named = re.fullmatch(r"[0-9a-f]{40}", record["revision"]) and record["id"].count("/") == 1
        except (ValueError, KeyError, TypeError, AttributeError):
            named = False
        if not named:
            raise ValueError(
                f"config.backbones[{role!r}] is {record}; a light checkpoint names a Hub id (owner/name) and a commit."
            )
        # Some versions of the client ask the Hub even in offline mode, unless this is set.
        hub["local_files_only"] = hub.get("local_files_only") or constants.HF_HUB_OFFLINE
        try:
            folder = snapshot_download(
                record["id"], revision=record["revision"], allow_patterns=["*.json", "model*.safetensors"], **hub
            )
        except OSError as error:
            raise OSError(
                f"this is a light checkpoint, and its {role} {record['id']} at {record['revision']} is not to be had "
                f"({type(error).__name__}). Connect to the Hub, or name a folder: from_pretrained(…, {role}=FOLDER)."
            ) from error
    if read_fingerprint(weight_files(folder))[0] != record.get("fingerprint"):
        raise ValueError(
            f"the weights of {folder} are not those of the {role} that this light checkpoint was trained with"
            f" ({record.get('id')})."
        )
    return str(folder)
