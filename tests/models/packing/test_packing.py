"""The trie on hand-written examples, and loss and gradient against the plain batch for every LM family."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from frozenprefix.errors import TrainingError
from frozenprefix.models.fusion import fuse_prefix
from frozenprefix.models.language_model import DecoderOnlyLM
from frozenprefix.models.packing import Target, ancestor_mask, build_trie, pack
from tests.helpers.lm import TINY

IMAGE = 999
FAMILIES = ["gpt2", "opt", "gpt_neox", "llama", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3"]
# two placeholders, then the words
CAPTIONS = [Target([IMAGE, IMAGE, *words, 2], 2) for words in ([5, 6, 7], [5, 6, 8], [9])]


def test_trie_by_hand():
    trie = build_trie(CAPTIONS, IMAGE)
    assert trie.ids == [IMAGE, IMAGE, 5, 6, 7, 8, 9]
    assert trie.depth == [0, 1, 2, 3, 4, 4, 2]
    assert trie.end == [7, 7, 6, 6, 5, 6, 7]
    assert trie.prefix == [0, 1, -1, -1, -1, -1, -1]
    assert trie.edges == {(1, 5): 2, (2, 6): 2, (3, 7): 1, (4, 2): 1, (3, 8): 1, (5, 2): 1, (1, 9): 1, (6, 2): 1}


def test_flat_shares_the_prefix_only():
    trie = build_trie(CAPTIONS, IMAGE, share=False)
    assert trie.ids == [IMAGE, IMAGE, 5, 6, 7, 5, 6, 8, 9]
    assert trie.depth == [0, 1, 2, 3, 4, 2, 3, 4, 2]
    assert trie.edges[1, 5] == 2, "both captions are predicted by the last prefix position"


def test_flat_shares_the_prompt_but_no_learned_token():
    targets = [Target([IMAGE, 4, 4, 5, 2], 3), Target([IMAGE, 4, 4, 5, 3, 2], 3)]
    assert build_trie(targets, IMAGE, share=False).ids == [IMAGE, 4, 4, 5, 5, 3]


def test_prompts_branch_in_the_trie():
    questions = [Target([IMAGE, 4, 5, 8, 2], 3), Target([IMAGE, 4, 6, 8, 2], 3)]
    trie = build_trie(questions, IMAGE)
    assert trie.ids == [IMAGE, 4, 5, 8, 6, 8]
    assert trie.edges == {(2, 8): 1, (3, 2): 1, (4, 8): 1, (5, 2): 1}, "no prompt token is learned"


def test_end_token_is_learned_even_when_it_is_the_pad():
    batch = pack([[Target([IMAGE, 5, 0], 1)]], image_token_id=IMAGE, prefix_length=1)
    assert 0 in batch.edge_label.tolist()


def test_mask_by_hand():
    end = torch.tensor([[4, 3, 3, 4, 5]])  # 0 ┬ 1 ─ 2 / └ 3, and padding
    seen = ancestor_mask(end, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


def test_rows_hold_several_images_up_to_the_budget():
    images = [[Target([IMAGE, 5, 6, 2], 1)], [Target([IMAGE, 5, 2], 1)], [Target([IMAGE, 7, 2], 1)]]
    batch = pack(images, image_token_id=IMAGE, prefix_length=1, tokens_per_row=4)
    assert batch.input_ids.shape == (2, 4)
    assert sorted(batch.prefix_index[batch.prefix_index >= 0].tolist()) == [0, 1, 2]
    assert (batch.num_targets, batch.num_tokens) == (3, 7)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "without any target"),
        ([[Target([IMAGE, 5], 2)]], "no token left to learn"),
        ([[Target([5, 2], 1)]], "0 image placeholders, expected 1"),
        ([[Target([IMAGE, 2], 0)]], "first token"),
    ],
)
def test_nothing_to_learn_is_an_error(images, message):
    with pytest.raises(TrainingError, match=message):
        pack(images, image_token_id=IMAGE, prefix_length=1)


def random_images(prefix_length: int, seed: int = 0) -> list[list[Target]]:
    """Three images with 5, 1 and 3 targets that share first words; the last one has prompts of two kinds."""
    draw = torch.Generator().manual_seed(seed)

    def words(n, high=40):
        return torch.randint(3, high, (n,), generator=draw).tolist()

    prefix, start = [IMAGE] * prefix_length, words(2)
    captions = [Target([*prefix, *start, *words(n, 6), 2], prefix_length) for n in (4, 2, 6, 4, 1)]
    questions = [Target([1, *prefix, 9, 9 + i % 2, *words(2), 2], prefix_length + 3) for i in range(3)]
    return [captions, [Target([*prefix, *words(3), 2], prefix_length)], questions]


def plain_loss(lm, images, prefix_embeds):
    """Every target alone, unpadded, through the LM's own forward and torch's cross-entropy."""
    total, tokens = 0.0, 0
    for image, targets in enumerate(images):
        for target in targets:
            ids = torch.tensor(target.input_ids)
            prefix_index = torch.where(ids == IMAGE, (ids == IMAGE).cumsum(0) - 1, -1)
            embeds = fuse_prefix(
                lm.get_input_embeddings(), ids[None], prefix_index[None], prefix_embeds[image : image + 1]
            )
            logits = lm(inputs_embeds=embeds).logits[0, target.num_context - 1 : -1].float()
            total = total + torch.nn.functional.cross_entropy(logits, ids[target.num_context :], reduction="sum")
            tokens += len(ids) - target.num_context
    return total / tokens


def packed_loss(lm, batch, prefix_embeds):
    lm = DecoderOnlyLM(lm)
    inputs_embeds = fuse_prefix(lm.embed, batch.input_ids, batch.prefix_index, prefix_embeds)
    return lm.loss(batch, inputs_embeds) / batch.num_tokens


@pytest.mark.parity
@pytest.mark.parametrize("packing", ["trie", "flat", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_equal_the_plain_batch(tiny_lm, family, packing):
    lm = AutoModelForCausalLM.from_pretrained(tiny_lm(family)).eval().requires_grad_(False)
    prefix_length = 4
    images = random_images(prefix_length)
    torch.manual_seed(1)
    prefix_embeds = torch.randn(3, prefix_length, TINY["hidden"]) * 0.1

    def run(loss_of):
        leaf = prefix_embeds.clone().requires_grad_()
        loss = loss_of(leaf)
        loss.backward()
        return loss.item(), leaf.grad

    plain, plain_grad = run(lambda leaf: plain_loss(lm, images, leaf))
    batch = pack(
        images, image_token_id=IMAGE, prefix_length=prefix_length, packing=packing,
        tokens_per_row=64 if packing == "trie" else None,
    )  # fmt: skip
    packed, packed_grad = run(lambda leaf: packed_loss(lm, batch, leaf))
    assert packed == pytest.approx(plain, rel=1e-5)
    assert ((packed_grad - plain_grad).norm() / plain_grad.norm()).item() < 1e-5
    assert all(p.grad is None for p in lm.parameters()), "the frozen LM computed weight gradients"
