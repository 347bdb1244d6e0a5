"""From utterances to the tensors that the trainers feed to the model."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from seam.data.manifest import Utterance

# Utterances that the frozen encoder reads at once.
ENCODED_AT_ONCE = 32


class SpeechDataset(Dataset):
    """
    Features and transcript ids of utterances, decoded when asked for.

    Args:
        utterances: what to read. Longer audio than the encoder's window raises `ValueError` when it is read.
        processor ([`SeamProcessor`]): makes features and ids.
        casing: applied to each transcript (one of `seam.data.manifest.CASINGS`).
    """

    def __init__(self, utterances: Sequence[Utterance], processor, casing: Callable[[str], str] = str.lower):
        self.utterances = utterances
        self.processor = processor
        self.casing = casing

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        utterance = self.utterances[index]
        try:
            features = self.processor(audio=utterance.audio)
            token_ids = self.token_ids(index)
        except ValueError as error:
            raise ValueError(f"{utterance.audio}: {error}") from error
        return {
            "input_features": features["input_features"][0],
            "attention_mask": features["attention_mask"][0],
            "token_ids": token_ids,
        }

    def token_ids(self, index: int) -> torch.LongTensor:
        """Ids of one transcript `(tokens,)`."""
        return torch.tensor(self.processor.transcript_ids(self.casing(self.utterances[index].text)))


class ListDataset(Dataset):
    """Items that were computed once and are kept in memory."""

    def __init__(self, items: list[dict[str, torch.Tensor]]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.items[index]


class SpeechCollator:
    """
    Batches items of a [`SpeechDataset`], or items whose features were replaced by `speech_states` `(speech, d_speech)`.

    Args:
        processor ([`SeamProcessor`]): makes the labels.
    """

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, items: list[dict[str, torch.Tensor]]) -> dict:
        batch = {"labels": self.processor.labels([item["token_ids"].tolist() for item in items])}
        if "speech_states" in items[0]:
            states = [item["speech_states"] for item in items]
            batch["speech_states"] = pad_sequence(states, True)
            batch["speech_mask"] = pad_sequence([torch.ones(len(s), dtype=torch.long) for s in states], True)
        elif "input_features" in items[0]:
            batch["input_features"] = torch.stack([item["input_features"] for item in items])
            batch["attention_mask"] = torch.stack([item["attention_mask"] for item in items])
        if "alignment_ids" in items[0]:
            batch["alignment_ids"] = pad_sequence([i["alignment_ids"] for i in items], True, padding_value=-100)
        return batch


def keep_in_memory(dataset: Dataset, workers: int = 2) -> ListDataset:
    """Read every item once, in `workers` processes."""
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    # Clones: tensors that arrive from a worker keep one shared-memory file open each.
    items = [{k: v.clone() for k, v in item.items()} for item in tqdm(loader, desc="features", leave=False)]
    return ListDataset(items)


@torch.no_grad()
def encode(model, dataset: Dataset, batches: list[list[int]], workers: int = 2) -> Iterator[list[dict]]:
    """
    Batch by batch the items of a [`SpeechDataset`] with the frozen encoder's states in the place of their features, cut
    to each audio's own length.

    Args:
        batches: places in the data set.
        workers: processes that read it.
    """
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=list)
    model.eval()
    for batch in loader:
        features = torch.stack([item["input_features"] for item in batch]).to(model.device)
        attention_mask = torch.stack([item["attention_mask"] for item in batch]).to(model.device)
        speech_states, mask = model.encode(features, attention_mask)
        yield [
            {"speech_states": states[keep].cpu().clone(), "token_ids": item["token_ids"].clone()}
            for item, states, keep in zip(batch, speech_states, mask.bool(), strict=True)
        ]


def batches_in_order(length: int, batch_size: int) -> list[list[int]]:
    """Places `0 … length - 1`."""
    return [list(range(start, min(start + batch_size, length))) for start in range(0, length, batch_size)]


def batches_by_length(lengths: Sequence[float], batch_size: int) -> list[list[int]]:
    """
    Places of what is of like length, the longest first: batches are padded little, and what does not fit into memory
    fails at once. Equal lengths stay in their order.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [[order[place] for place in batch] for batch in batches_in_order(len(order), batch_size)]


def keep_encoder_states(model, dataset: Dataset, batch_size: int = ENCODED_AT_ONCE, workers: int = 2) -> ListDataset:
    """Run the frozen encoder once over a [`SpeechDataset`] and keep the states in memory."""
    batches = batches_in_order(len(dataset), batch_size)
    encoded = tqdm(encode(model, dataset, batches, workers), desc="encoder states", total=len(batches), leave=False)
    return ListDataset([item for batch in encoded for item in batch])
