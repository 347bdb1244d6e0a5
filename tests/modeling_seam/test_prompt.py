"""Where the prompt, the aligned embeddings and the reply become one sequence."""

import pytest
import torch

from seam.modeling_seam.prompt import left_pad, splice

pytestmark = pytest.mark.oldest


def test_left_pad():
    padded, mask = left_pad([torch.tensor([1, 2, 3]), torch.tensor([4])])
    assert padded.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_splice_puts_each_part_in_its_place():
    embed = torch.nn.Embedding.from_pretrained(torch.arange(20.0)[:, None])
    prompts = [torch.tensor([1, 2, 99, 3]), torch.tensor([5, 99])]
    aligned = [torch.tensor([[0.5], [0.6]]), torch.empty(0, 1)]
    embeds, mask = splice(embed, prompts, 99, aligned, [torch.tensor([7]), torch.tensor([], dtype=torch.long)])
    torch.testing.assert_close(embeds[0, :, 0], torch.tensor([1, 2, 0.5, 0.6, 3, 7]))
    torch.testing.assert_close(embeds[1, :, 0], torch.tensor([0, 0, 0, 0, 0, 5.0]))
    assert mask.tolist() == [[1] * 6, [0] * 5 + [1]]


@pytest.mark.parametrize("prompt", [[1, 2], [99, 1, 99]])
def test_a_prompt_without_exactly_one_audio_token_is_refused(prompt):
    with pytest.raises(ValueError, match=f"exactly once, found {prompt.count(99)}"):
        splice(torch.nn.Embedding(20, 2), [torch.tensor(prompt)], 99, [torch.zeros(1, 2)], [torch.tensor([1])])
