"""The chunked loss through a frozen head against torch's cross-entropy."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from frozenprefix.kernels.linear import PlainWeight
from frozenprefix.models.packing.loss import ROWS, next_token_loss

V, D = 50, 8


def edges(num_nodes: int, seed: int = 0):
    """Every third node has two next words, one of them three times; some nodes come late in the list."""
    draw = torch.Generator().manual_seed(seed)
    source = torch.cat([torch.arange(num_nodes), torch.arange(0, num_nodes, 3)])
    source = source[torch.randperm(len(source), generator=draw)]
    label = torch.randint(0, V, (len(source),), generator=draw)
    count = torch.randint(1, 4, (len(source),), generator=draw).float()
    return source, label, count


def reference(hidden, head, source, label, count, softcap=None, label_smoothing=0.0):
    logits = head(hidden).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    each = nn.functional.cross_entropy(logits[source], label, reduction="none", label_smoothing=label_smoothing)
    return (count * each).sum()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_nodes", [1, 7, ROWS, ROWS + 1, 2 * ROWS + 30])
def test_loss_and_gradient_through_a_frozen_head(num_nodes, bias):
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias).requires_grad_(False)
    hidden = torch.randn(num_nodes, D, requires_grad=True)
    expected = reference(hidden, head, *edges(num_nodes))
    (expected_grad,) = torch.autograd.grad(expected * 0.37, hidden)
    loss = next_token_loss(hidden, head, *edges(num_nodes))
    (grad,) = torch.autograd.grad(loss * 0.37, hidden)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    assert head.weight.grad is None


def small_tiles(monkeypatch):
    """Tiles of 16 words, so that a few rows and words make several."""
    for module in ("models.packing.loss", "kernels.linear"):
        monkeypatch.setattr(f"frozenprefix.{module}.TILE", 16)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_nodes", [1, 3, 4, 30])
def test_tiles_of_rows_and_words_give_the_whole(num_nodes, bias, softcap, label_smoothing, monkeypatch):
    """With one row in the first tile whose largest logit by far comes last, and one where it comes first."""
    small_tiles(monkeypatch)
    monkeypatch.setattr("frozenprefix.models.packing.loss.ROWS", 4)
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias).requires_grad_(False)
    with torch.no_grad():
        head.weight[-1], head.weight[0] = 30 * torch.eye(D)[0], 30 * torch.eye(D)[1]
    hidden = torch.randn(num_nodes, D)
    hidden[0, 0], hidden[-1, 1] = 5.0, 5.0
    hidden.requires_grad_()
    options = {"softcap": softcap, "label_smoothing": label_smoothing}
    expected = reference(hidden, head, *edges(num_nodes), **options)
    (expected_grad,) = torch.autograd.grad(expected, hidden)
    loss = next_token_loss(hidden, head, *edges(num_nodes), **options)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_one_tile_of_logits_at_a_time(monkeypatch):
    small_tiles(monkeypatch)
    forward, made, alive = PlainWeight.forward, [], []

    def counting(tile, x):
        alive.append(sum(logits() is not None for logits in made))
        logits = forward(tile, x)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(PlainWeight, "forward", counting)
    head = nn.Linear(D, V).requires_grad_(False)
    next_token_loss(torch.randn(9, D, requires_grad=True), head, *edges(9))
    assert alive == [0, 0, 0, 0]


def test_one_edge_by_hand():
    """Two equal logits: -log(1/2), three times."""
    head = nn.Linear(1, 2, bias=False).requires_grad_(False)
    nn.init.zeros_(head.weight)
    loss = next_token_loss(torch.ones(1, 1), head, torch.tensor([0]), torch.tensor([1]), torch.tensor([3.0]))
    assert loss.item() == pytest.approx(3 * 0.693147, abs=1e-5)


def test_a_trained_head_gets_its_gradient():
    torch.manual_seed(0)
    head = nn.Linear(D, V)
    hidden = torch.randn(9, D, requires_grad=True)
    loss = next_token_loss(hidden, head, *edges(9), label_smoothing=0.1)
    assert loss.item() == pytest.approx(reference(hidden, head, *edges(9), label_smoothing=0.1).item(), rel=1e-5)
    loss.backward()
    assert head.weight.grad.abs().sum() > 0


def test_softcap():
    torch.manual_seed(0)
    head = nn.Linear(D, V).requires_grad_(False)
    hidden = (torch.randn(9, D) * 20).requires_grad_()
    loss = next_token_loss(hidden, head, *edges(9), softcap=5.0)
    capped = reference(hidden, head, *edges(9), softcap=5.0)
    assert loss.item() == pytest.approx(capped.item(), rel=1e-5)
    assert abs(loss.item() - reference(hidden, head, *edges(9)).item()) > 1
    loss.backward()
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_in_bfloat16_the_loss_is_float32(softcap):
    torch.manual_seed(0)
    head = nn.Linear(D, V).requires_grad_(False)
    hidden = torch.randn(300, D)
    exact = reference(hidden, head, *edges(300), softcap).item()
    short = hidden.bfloat16().requires_grad_()
    loss = next_token_loss(short, head.bfloat16(), *edges(300), softcap=softcap)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=1e-2)
    loss.backward()
    assert short.grad.dtype == torch.bfloat16


def test_without_gradient_nothing_is_kept():
    head = nn.Linear(D, V).requires_grad_(False)
    with torch.no_grad():
        loss = next_token_loss(torch.randn(5, D), head, *edges(5))
    assert not loss.requires_grad
