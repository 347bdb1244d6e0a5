"""Turn utterances into the tensors that the trainers feed to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from seam.data.augmentation import Augmentation
from seam.data.bad_audio import SkippedAudio, read_batch
from seam.data.manifest import AudioBytes, Utterance, check_duration

if TYPE_CHECKING:
    from seam.processing_seam import SeamProcessor

ENCODER_BATCH_SIZE = 32


class SpeechEncoder(Protocol):
    """What [`SeamForSpeechRecognition`] needs to have here."""

    @property
    def device(self) -> torch.device:
        """Return where its weights are."""

    def eval(self) -> Any:
        """Switch dropout off."""

    def encode(self, input_features: Any, attention_mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return speech states `(batch, speech, d_speech)` and their mask `(batch, speech)`."""


class SpeechReader:
    """
    Make the training item of an utterance: decode, augment, compute features and ids.

    Args:
        processor ([`SeamProcessor`]): makes features and ids.
        casing: applied to each transcript (one of `seam.data.manifest.CASINGS`).
        augmentation: by default none.
        max_tokens: that a transcript may have; `None` for any number.
    """

    def __init__(
        self,
        processor: SeamProcessor,
        casing: Callable[[str], str] = str.lower,
        augmentation: Augmentation | None = None,
        max_tokens: int | None = None,
    ):
        self.processor = processor
        self.casing = casing
        self.augmentation = augmentation or Augmentation()
        self.max_tokens = max_tokens

    def __call__(
        self, utterance: Utterance, seed: Sequence[int] = (), draw: Callable[[int], Utterance] | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Make the item of an utterance.

        Args:
            utterance: audio longer than the encoder's window is an error.
            seed: non-negative numbers that decide what is drawn. Nothing is drawn from global state, so that the item
                depends neither on the worker that makes it nor on the items before.
            draw: returns an utterance for a random number below 2**31; without it no utterance is appended.

        Returns:
            `input_features` `(mels, frames)`, `attention_mask` `(frames,)` and `token_ids` `(tokens,)`.

        Raises:
            OSError, ValueError: what is wrong with the audio or the text, with the name of the file.
        """
        if not self.augmentation:
            return self._item([utterance], lambda waveform: waveform)
        rng = np.random.default_rng([*seed])
        parts = [utterance]
        if draw is not None:
            parts = self.augmentation.concatenate(utterance, lambda: draw(int(rng.integers(2**31))), rng, self._fits)
        rate = self.processor.sampling_rate
        max_samples = int(self.processor.max_seconds * rate)
        item = self._item(parts, lambda waveform: self.augmentation.change_waveform(waveform, rng, rate, max_samples))
        frames = int(item["attention_mask"].sum())
        return {**item, "input_features": self.augmentation.mask_features(item["input_features"], frames, rng)}

    def _fits(self, parts: Sequence[Utterance]) -> bool:
        if sum(part.duration for part in parts) > self.processor.max_seconds:
            return False
        return self.max_tokens is None or len(self.token_ids(parts)) <= self.max_tokens

    def token_ids(self, parts: Sequence[Utterance]) -> list[int]:
        """Return the ids of the joined transcripts, of which some may be empty."""
        texts = [self.casing(part.text).strip() for part in parts]
        return self.processor.transcript_ids(" ".join(filter(None, texts)))

    def check_transcript(self, token_ids: Sequence[int]) -> None:
        """Raise `ValueError` for a transcript of more than `max_tokens`."""
        if self.max_tokens is not None and len(token_ids) > self.max_tokens:
            raise ValueError(
                f"a transcript of {len(token_ids)} tokens, but the aligner has positions for {self.max_tokens}."
            )

    def _load(self, audio: Path | AudioBytes) -> np.ndarray:
        return self.processor.load_audio(audio if isinstance(audio, Path) else audio.read(), allow_cut=False)

    def _item(self, parts: Sequence[Utterance], change: Callable[[np.ndarray], np.ndarray]) -> dict[str, torch.Tensor]:
        try:
            waveforms = [self._load(part.audio) for part in parts]
            features = self.processor(audio=change(np.concatenate(waveforms)))
            for part, waveform in zip(parts, waveforms, strict=True):
                check_duration(part, len(waveform) / self.processor.sampling_rate)
            token_ids = self.token_ids(parts)
            self.check_transcript(token_ids)
        except ValueError as error:
            raise ValueError(f"{' and '.join(str(part.audio) for part in parts)}: {error}") from error
        return {
            "input_features": features["input_features"][0],
            "attention_mask": features["attention_mask"][0],
            "token_ids": torch.tensor(token_ids, dtype=torch.long),  # of an empty transcript, too
        }


class SpeechDataset(Dataset):
    """
    Features and transcript ids of utterances, decoded on access. An augmentation draws anew in every epoch.

    Args:
        utterances: what to read.
        processor, casing, augmentation, max_tokens: of the [`SpeechReader`].
        seed: of the augmentation.
        skipped: receives the recordings that cannot be read, which are then left out of their batches; `None` raises
            their errors instead.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        processor: SeamProcessor,
        casing: Callable[[str], str] = str.lower,
        augmentation: Augmentation | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        skipped: SkippedAudio | None = None,
    ):
        self.utterances = utterances
        self.reader = SpeechReader(processor, casing, augmentation, max_tokens)
        self.seed = seed
        self.skipped = skipped
        # Shared with the workers of a loader, which may live longer than an epoch.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        return len(self.utterances)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, before its iterator is created."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        seed = (self.seed, int(self._epoch), index)
        return self.reader(self.utterances[index], seed, lambda number: self.utterances[number % len(self)])

    def token_ids(self, index: int) -> torch.Tensor:
        """Return the ids of one transcript `(tokens,)`, without augmentation."""
        return torch.tensor(self.reader.token_ids([self.utterances[index]]), dtype=torch.long)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Return the items of a batch, which torch's loaders request at once."""
        return read_batch(self.__getitem__, self.utterances, indices, self.skipped)


class ListDataset(Dataset):
    """Items that were computed once and stay in memory."""

    def __init__(self, items: list[dict[str, torch.Tensor]]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.items[index]


class SpeechCollator:
    """
    Collate items to a padded batch.

    The items are those of a [`SpeechDataset`], or their features were replaced by `speech_states` `(speech, d_speech)`
    or `aligned_embeds` `(tokens, d_llm)`.

    Args:
        processor ([`SeamProcessor`]): makes the labels.
    """

    def __init__(self, processor: SeamProcessor):
        self.processor = processor

    def __call__(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the batch of some items."""
        if not items:  # a batch of a stream that a resumed training drops
            return {}
        batch: dict[str, torch.Tensor] = {
            "labels": self.processor.labels([item["token_ids"].tolist() for item in items])
        }
        for states, mask in (("speech_states", "speech_mask"), ("aligned_embeds", "aligned_mask")):
            if states in items[0]:
                batch[states] = pad_sequence([item[states] for item in items], True)
                ones = [torch.ones(len(item[states]), dtype=torch.long) for item in items]
                batch[mask] = pad_sequence(ones, True)
        if "input_features" in items[0]:
            batch["input_features"] = torch.stack([item["input_features"] for item in items])
            batch["attention_mask"] = torch.stack([item["attention_mask"] for item in items])
        if "alignment_ids" in items[0]:
            batch["alignment_ids"] = pad_sequence([i["alignment_ids"] for i in items], True, padding_value=-100)
        return batch


def keep_in_memory(dataset: SpeechDataset, workers: int = 2) -> ListDataset:
    """Read every item once, in `workers` processes."""
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    # Clones: tensors that arrive from a worker keep one shared-memory file open each.
    items = [{k: v.clone() for k, v in item.items()} for item in tqdm(loader, desc="features", leave=False)]
    return ListDataset(items)


@torch.no_grad()
def encode(
    model: SpeechEncoder, dataset: SpeechDataset, batches: list[list[int]], workers: int = 2, bf16: bool = False
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """
    Encode a [`SpeechDataset`] with the frozen encoder, batch by batch.

    Args:
        batches: indices of the items of each batch.
        workers: processes that read the data set.
        bf16: whether the encoder computes in bf16.

    Yields:
        Items with `speech_states` `(speech, d_speech)`, cut to the length of the audio, instead of features.
    """
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=list)
    model.eval()
    for batch in loader:
        features = torch.stack([item["input_features"] for item in batch]).to(model.device)
        attention_mask = torch.stack([item["attention_mask"] for item in batch]).to(model.device)
        with torch.autocast(features.device.type, torch.bfloat16, enabled=bf16):
            speech_states, mask = model.encode(features, attention_mask)
        yield [
            {"speech_states": states[keep].cpu().clone(), "token_ids": item["token_ids"].clone()}
            for item, states, keep in zip(batch, speech_states, mask.bool(), strict=True)
        ]


def batches_in_order(length: int, batch_size: int) -> list[list[int]]:
    """Divide the indices `0 … length - 1` into batches, in order."""
    return [list(range(start, min(start + batch_size, length))) for start in range(0, length, batch_size)]


def batches_by_length(lengths: Sequence[float], batch_size: int) -> list[list[int]]:
    """
    Divide indices into batches of like length, the longest first.

    So batches are padded little, and one that does not fit into memory fails at once. Equal lengths keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [[order[index] for index in batch] for batch in batches_in_order(len(order), batch_size)]


def keep_encoder_states(
    model: SpeechEncoder, dataset: SpeechDataset, batch_size: int = ENCODER_BATCH_SIZE, workers: int = 2
) -> ListDataset:
    """Encode a [`SpeechDataset`] once and keep the states in memory."""
    batches = batches_in_order(len(dataset), batch_size)
    encoded = tqdm(encode(model, dataset, batches, workers), desc="encoder states", total=len(batches), leave=False)
    return ListDataset([item for batch in encoded for item in batch])
