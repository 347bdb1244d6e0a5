"""Run a Whisper encoder on the audio and what follows it, instead of on its full window."""

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

FRAMES_PER_SECOND = 100  # of Whisper's log-mel features
FRAMES_PER_STATE = 2


def frames_with_margin(lengths: torch.Tensor, margin: float, window: int) -> torch.Tensor:
    """
    Return how many frames of each utterance belong to its audio and the margin after it.

    Args:
        lengths: frames of the audio, `(batch,)`.
        margin: in seconds.
        window: frames that there are.

    Returns:
        `(batch,)`, as whole states: an even number, at most the window.
    """
    frames = lengths + round(margin * FRAMES_PER_SECOND)
    return (frames + frames % FRAMES_PER_STATE).clamp_max(window)


def encode_frames(
    encoder: WhisperEncoder, features: torch.Tensor, frames: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Encode the first frames of each utterance as if there were no others.

    The layers are run here, for `WhisperEncoder.forward` takes nothing but full windows. An utterance has the same
    states alone and in a batch: past its end the features are zero, as the convolutions' own padding is, and attention
    is masked. The second convolution moves two frames at a time: no state of an utterance's own reaches past its end.

    Args:
        encoder: the weights.
        features: `(batch, n_mels, frames)`.
        frames: of each utterance, `(batch,)`; see `frames_with_margin`.

    Returns:
        The states `(batch, longest, d_speech)` and their mask `(batch, longest)`.
    """
    longest = int(frames.max())
    is_own = torch.arange(longest, device=features.device) < frames[:, None]
    features = features[:, :, :longest] * is_own[:, None]
    states = nn.functional.gelu(encoder.conv1(features))
    states = nn.functional.gelu(encoder.conv2(states)).transpose(1, 2)
    mask = is_own[:, ::FRAMES_PER_STATE].long()
    positions = torch.arange(states.shape[1], device=states.device)
    states = states + encoder.embed_positions(positions)
    attention_mask = create_bidirectional_mask(
        config=encoder.config, inputs_embeds=states, attention_mask=mask, encoder_hidden_states=None
    )
    for layer in encoder.layers:
        states = layer(states, attention_mask)
    return encoder.layer_norm(states), mask
