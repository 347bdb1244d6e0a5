"""Compare what a config describes with what the weight files hold, before anything of that size is built."""

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from .weights import TIED_HEADS, is_trained_by_seam

if TYPE_CHECKING:
    from .loading import Checkpoint

# The fields that say how many layers a part has, and where its tensors are.
LAYERS = (
    ("audio_config", "encoder_layers", "encoder."),
    ("aligner_config", "decoder_layers", "bridge."),
    ("text_config", "num_hidden_layers", "language_model."),
)


def check_sizes(model_class: type, checkpoint: "Checkpoint") -> None:
    """
    Check that a checkpoint's weight files hold a model of the sizes in its config, by their headers.

    The model is built without memory for its weights, and only if the files have as many tensors as it has layers.

    Raises:
        ValueError: naming the first size that is another, or saying why the config describes no model.
    """
    config, name, light = copy.deepcopy(checkpoint.config), checkpoint.name, checkpoint.config.light_checkpoint
    shapes = _shapes(checkpoint)
    if light:  # the encoder is not in the file
        config.audio_config.encoder_layers = 0
    for part, field, prefix in LAYERS:
        if part == "aligner_config" and config.bridge != "aligner" or part == "text_config" and config.alignment_only:
            continue
        layers, tensors = getattr(getattr(config, part), field, 0), sum(key.startswith(prefix) for key in shapes)
        if isinstance(layers, int) and layers > tensors:
            raise ValueError(f"{name}: {part}.{field} is {layers}, but the weight files hold {tensors} of its tensors.")
    try:
        with torch.device("meta"):
            model = model_class(config)
    except (ValueError, ImportError):
        raise
    except Exception as error:  # whatever torch and transformers say of sizes that cannot be
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: config.json describes no model that can be built: {reason}") from error
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if light:
        expected = {key: shape for key, shape in expected.items() if is_trained_by_seam(key, config)}
    for key in expected.keys() & shapes.keys():
        if expected[key] != shapes[key]:
            raise ValueError(
                f"{name} does not fit its config: 1 mismatched keys ({key}: {list(shapes[key])} in the weight file, "
                f"{list(expected[key])} by config.json)."
            )
    missing = {key: math.prod(shape) for key, shape in expected.items() if key not in shapes}
    missing = {key: size for key, size in missing.items() if not key.endswith(TIED_HEADS)}
    if sum(missing.values()) > sum(map(math.prod, shapes.values())):
        raise ValueError(f"{name} does not fit its config: {len(missing)} missing keys ({min(missing)}).")


def _shapes(checkpoint: "Checkpoint") -> dict[str, tuple[int, ...]]:
    """Return the shape of each stored tensor, from the headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in {tensor.file for tensor in checkpoint.stored.values()}:
        try:
            with safe_open(file, framework="pt") as opened:
                own: dict[str, Any] = {key: one for key, one in checkpoint.stored.items() if one.file == file}
                shapes |= {key: tuple(opened.get_slice(one.key).get_shape()) for key, one in own.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"the weight file {file} is damaged: {error}") from error
    return shapes
