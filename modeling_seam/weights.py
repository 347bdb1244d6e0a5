"""Weight files of a checkpoint: found, checked and fingerprinted. Safetensors only: nothing is unpickled."""

import base64
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

logger = logging.get_logger(__name__)

HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
WEIGHT_FILES = "model*.safetensors*"  # with the index of shards: what a later save makes stale
FULL = "sha256:"  # what a fingerprint begins with that is of all bytes
# Elements of each tensor that fingerprints sampled before: enough to tell two trainings apart, but no single bit.
SAMPLES = 64
# A copy of the embedding table that some files hold and others do without.
TIED_HEADS = ("lm_head.weight", "proj_out.weight")
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
    if file is not None:
        try:
            GenerationConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
            raise ValueError(f"{file} is damaged: a setting is of another type ({error}).") from error


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
    """
    Return a digest of the tensors' names, types, shapes and all of their bytes.

    A copy of the embedding table that some files hold and others do without (see `TIED_HEADS`) does not count. It takes
    about a second for each gigabyte and core.
    """
    return _digest(tensors, lambda key: tensors[key])


def _digest(keys: Iterable[str], read: Callable[[str], torch.Tensor]) -> str:
    """Return the fingerprint of tensors that are read one by one, by as many threads as there are cores."""
    keys = sorted(keys)
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as threads:
        contents = dict(zip(keys, threads.map(lambda key: _content(read(key)), keys), strict=True))
    others = {content for key, content in contents.items() if not key.endswith(TIED_HEADS)}
    digest = hashlib.sha256()
    for key, content in contents.items():
        if not (key.endswith(TIED_HEADS) and content in others):
            digest.update(f"{key} {content}\n".encode())
    return FULL + digest.hexdigest()


def _content(tensor: torch.Tensor) -> str:
    """Return type, shape and digest of a tensor."""
    digest = hashlib.sha256()
    if tensor.numel():
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return f"{tensor.dtype} {tuple(tensor.shape)} {digest.hexdigest()}"


def sampled_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the digest that fingerprints were before they were of all bytes: of some values of each tensor."""
    return _sampled_digest({key: _sample(tensor) for key, tensor in tensors.items()})


def _sample(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    values = tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLES)]
    return str(tensor.dtype), tuple(tensor.shape), values.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _sampled_digest(seen: dict[str, tuple[str, tuple[int, ...], bytes]]) -> str:
    digest = hashlib.sha256()
    for key, (dtype, shape, values) in sorted(seen.items()):
        digest.update(f"{key} {dtype} {shape} ".encode() + values)
    return digest.hexdigest()


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a weight file. Raises `ValueError`, by its name, for one that is cut off or no safetensors file."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the weight file {file} is damaged: {error}") from error


def read_stored(files: list[Path]) -> dict[str, StoredTensor]:
    """
    Return where each tensor of weight files lies, by its name in the model (see `OLD_NAMES`).

    Raises:
        ValueError: for a file that is cut off or no safetensors file, by its name.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        with _opened(file) as opened:
            stored |= {new_name(key): StoredTensor(file, key) for key in opened.keys()}
    return stored


def read_fingerprint(files: list[Path]) -> str:
    """
    Return the fingerprint of weight files, which is of the names in the files.

    Raises:
        ValueError: for a file that is cut off or no safetensors file, by its name.
    """
    return _read_fingerprint(tuple((file, file.stat().st_ino, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=8)  # a light checkpoint asks several times for the same backbone
def _read_fingerprint(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Return the fingerprint of weight files, as they are at some time."""
    with ExitStack() as stack:
        lies = {
            key: opened
            for opened in (stack.enter_context(_opened(file)) for file, *_ in files)
            for key in opened.keys()
        }
        return _digest(lies, lambda key: lies[key].get_tensor(key))  # mapped


def have_fingerprint(files: list[Path], expected: str) -> bool:
    """Return whether weight files have a fingerprint, which an older checkpoint states of some values only."""
    if expected.startswith(FULL):
        return read_fingerprint(files) == expected
    seen: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for file in files:
        with _opened(file) as opened:
            seen |= {key: _sample(opened.get_tensor(key)) for key in opened.keys()}  # mapped: only the samples are read
    return _sampled_digest(seen) == expected


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


# What is read of a backbone; with the tokenizers, older ones included, of which a table is made.
BACKBONE_FILES = ["*.json", "model*.safetensors", "merges.txt", "tokenizer.model"]
# In a folder that was converted from a package: what `backbone_record` says of it.
BACKBONE_RECORD = "seam_backbone.json"


def packaged_folder(hub_id: str) -> Path:
    """Return where `seam backbones` lays down a backbone, in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "seam" / "backbones" / hub_id.split("/")[1]


def backbone_record(name: str | Path) -> dict[str, Any] | None:
    """
    Return what a config says of a backbone, so that a light checkpoint finds it again.

    Returns:
        Hub id, commit, fingerprint and samples of the weights. Without a commit for a folder that was converted from a
        package, if its weights are still those; `None` for any other folder, which others lack.
    """
    if Path(name).exists():
        return _packaged_record(Path(name))
    files = weight_files(name)
    return {"id": str(name), "revision": files[0].parent.name, **weights_record(files)}


def weights_record(files: list[Path], **options) -> dict[str, Any]:
    """Return fingerprint and samples of weight files; see `WeightSamples.read`."""
    return {"fingerprint": read_fingerprint(files), "samples": WeightSamples.read(files, **options).to_dict()}


def _packaged_record(folder: Path) -> dict[str, Any] | None:
    """Return the record in a folder, if there is one and the weights are still those that it was written for."""
    try:
        record = json.loads((folder / BACKBONE_RECORD).read_text(encoding="utf-8"))
        same = have_fingerprint(weight_files(folder), record["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if same else None


def backbone_folder(role: str, record: dict, given: str | None, **hub) -> str:
    """
    Return where a light checkpoint's backbone lies.

    It is the folder or id that the user named, the snapshot of the Hub id in the config, or what `seam backbones` has
    laid down for that id: never a path in the config. Its weights may be in another precision than in training; in the
    same precision every byte must be the same.

    Args:
        role: `"encoder"` or `"llm"`.
        record: see `backbone_record`.
        given: folder or id that the user named instead.
        hub: `cache_dir`, `local_files_only`, `token`.

    Raises:
        OSError: when it cannot be found or downloaded.
        ValueError: when the config names no Hub id and commit, or the weights are not those of the training.
    """
    folder = _find_backbone(role, record, hub) if given is None else given
    files = weight_files(folder)
    expected = record.get("fingerprint")
    if not isinstance(expected, str) or not have_fingerprint(files, expected):
        trained, found = WeightSamples.of(record), None
        if trained is not None:
            found = WeightSamples.of(_packaged_record(Path(folder)) or {}) or WeightSamples.read(files)
            if trained.precision == found.precision and str(expected).startswith(FULL):
                found = None  # other bytes in the same precision are other weights
        if trained is None or found is None or not trained.agree(found):
            raise ValueError(
                f"the weights of {folder} are not those of the {role} that this light checkpoint was trained with"
                f" ({record.get('id')})."
            )
        logger.warning(
            f"the {role} {record.get('id')} is here in {found.precision}, and the checkpoint was trained with it in "
            f"{trained.precision}: the same weights, so that results differ by rounding only."
        )
    return str(folder)


def _find_backbone(role: str, record: dict, hub: dict[str, Any]) -> str:
    """Return the folder of the backbone that the record names: of the Hub's cache, or of the packaged ones."""
    try:
        validate_repo_id(record["id"])
        named = record["id"].count("/") == 1
        # A packaged folder has no commit. Then any of the Hub will do whose weights agree.
        named &= "samples" in record if "revision" not in record else _is_commit(record["revision"])
    except (ValueError, KeyError, TypeError, AttributeError):
        named = False
    if not named:
        shown: Any = record
        if isinstance(record, dict):  # without those thousands of values
            shown = {key: value for key, value in record.items() if key != "samples"}
        raise ValueError(
            f"config.backbones[{role!r}] is {shown}; a light checkpoint names a Hub id (owner/name) and a commit."
        )
    folder, commit = packaged_folder(record["id"]), record.get("revision")
    packaged = (_packaged_record(folder) or {}).get("id") == record["id"]
    if packaged and commit is None:
        return str(folder)
    # Some versions of the client ask the Hub even in offline mode, unless this is set.
    hub["local_files_only"] = hub.get("local_files_only") or constants.HF_HUB_OFFLINE
    try:
        return snapshot_download(record["id"], revision=commit, allow_patterns=BACKBONE_FILES, **hub)
    except OSError as error:
        if packaged:
            return str(folder)
        where = "" if commit is None else f" at {commit}"
        advice = "Connect" if commit is not None else "Run `seam backbones`, connect"
        raise OSError(
            f"this is a light checkpoint, and its {role} {record['id']}{where} is not to be had "
            f"({type(error).__name__}). {advice} to the Hub, or name a folder: from_pretrained(…, {role}=FOLDER)."
        ) from error


def _is_commit(revision: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


# ---- the same weights in another precision ----

# Values of a backbone that its record holds, evenly spread over its tensors, and the share of them that may differ by
# more than the precisions explain. Of weights that were trained on more do: of Whisper-base's in float16 74 % when
# moved by a thousandth of their spread; of SmolLM2's layers in 4 bits 6 % when moved by three hundredths, 0.5 % by one.
VALUES, MAY_DIFFER = 2000, 0.02
ALLOWANCE = 1.01  # for the arithmetic of conversions


@dataclass(frozen=True)
class WeightSamples:
    """
    Some of the values of weight files, to know the same weights again in another precision.

    Args:
        layout: digest of the tensors' names and shapes.
        precision: the one that most values are stored in, as a user would call it.
        values: of shape (n,).
        half_steps: of shape (n,): how far each value may lie from the one that it was rounded from.
    """

    layout: str
    precision: str
    values: np.ndarray
    half_steps: np.ndarray

    @classmethod
    def read(
        cls,
        files: list[Path],
        precision: str | None = None,
        half_steps: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    ) -> Self:
        """
        Read samples of weight files.

        Args:
            precision: if it is not the type of the files.
            half_steps: for weights that were rounded more coarsely than to the type of the files: returns how far each
                element of a tensor, which is given with its name, may lie from the original.
        """
        stored = read_stored(files)
        samples = {name: _sample(tensor.read()) for name, tensor in stored.items()}
        for head in [name for name in stored if name.endswith(TIED_HEADS)]:
            if sum(sample == samples[head] for sample in samples.values()) > 1:
                del stored[head]
        shapes, dtypes, values, steps = [], Counter[str](), [], []
        for name, one in sorted(stored.items()):
            tensor = one.read()
            shapes.append(f"{name} {tuple(tensor.shape)}\n")
            dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
            where = _positions(tensor.numel(), max(1, VALUES // len(stored)))
            chosen = tensor.flatten()[where]
            values.append(chosen.double())
            steps.append(_half_ulp(chosen))
            if half_steps is not None:
                steps[-1] += half_steps(name, tensor).flatten()[where].double()
        return cls(
            hashlib.sha256("".join(shapes).encode()).hexdigest(),
            precision or dtypes.most_common(1)[0][0],
            torch.cat(values).numpy(),
            torch.cat(steps).numpy(),
        )

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self | None:
        """
        Return the samples in a backbone's record, or `None` for a record from before there were any.

        Raises:
            ValueError: when they are damaged.
        """
        if "samples" not in record or not isinstance(record.get("fingerprint"), str):
            return None
        try:
            content = record["samples"]
            values, half_steps = (
                np.frombuffer(base64.b64decode(content[name], validate=True), "<f4").astype(np.float64)
                for name in ("values", "half_steps")
            )
            if values.shape != half_steps.shape or not values.size:
                raise ValueError("their numbers differ")
            return cls(str(content["layout"]), str(content["precision"]), values, half_steps)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the samples of {record.get('id')} in config.backbones are damaged: {error}") from error

    def to_dict(self) -> dict[str, str]:
        """Return what `of` reads, for a config: the numbers as little-endian float32 in base64."""
        numbers = {"values": self.values, "half_steps": self.half_steps}
        encoded = {name: base64.b64encode(one.astype("<f4").tobytes()).decode() for name, one in numbers.items()}
        return {"layout": self.layout, "precision": self.precision, **encoded}

    def agree(self, other: "WeightSamples") -> bool:
        """Return whether both are of the same weights, each in its precision."""
        if self.layout != other.layout or self.values.shape != other.values.shape:
            return False
        near = np.abs(self.values - other.values) <= ALLOWANCE * (self.half_steps + other.half_steps)
        return bool(np.mean(~near) <= MAY_DIFFER)  # what is not a number is near nothing


def _positions(n: int, count: int) -> list[int]:
    """Return at most `count` positions within `n`, spread by the golden ratio, so that no column of a matrix recurs."""
    golden = 0x9E3779B97F4A7C15  # of 2 ** 64
    return sorted({((2 * i + 1) * golden % 2**64) * n >> 64 for i in range(count)}) if n else []


def _half_ulp(values: torch.Tensor) -> torch.Tensor:
    """Return half the distance between neighbouring numbers of the values' type, where they are, in float64."""
    if not values.is_floating_point():
        return torch.zeros(values.shape, dtype=torch.float64)
    numbers = torch.finfo(values.dtype)
    exponents = torch.frexp(values.double().abs().clamp(min=numbers.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full(values.shape, numbers.eps / 2, dtype=torch.float64), exponents)
