"""Contrastive losses and gradient caching, against open_clip's losses and against plain sums."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import nn
from torch.nn import functional as F

from frozenprefix.errors import DataError
from frozenprefix.models.contrastive.gradient_cache import cached_contrastive_step
from frozenprefix.models.contrastive.losses import (
    LogitScale,
    contrastive_loss,
    gather_rows,
    infonce_loss,
    sigmoid_loss,
)
from tests.helpers import ROOT


def unit(rows: int, seed: int, dim: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parity
@pytest.mark.parametrize(("objective", "theirs"), [("infonce", ClipLoss()), ("sigmoid", SigLipLoss())])
def test_one_text_per_image_gives_open_clips_loss_and_gradient(objective, theirs):
    images, texts = unit(6, 0).requires_grad_(), unit(6, 1).requires_grad_()
    scale = LogitScale(objective)
    ids = torch.arange(6) * 7
    ours = contrastive_loss(objective, scale, images, texts, ids, ids)
    gradients = torch.autograd.grad(ours, [images, texts, scale.log_scale])
    wanted = theirs(images, texts, scale.scale, scale.bias)
    expected = torch.autograd.grad(wanted, [images, texts, scale.log_scale])
    torch.testing.assert_close(ours, wanted)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("objective", "scale", "bias"), [("infonce", 1 / 0.07, None), ("sigmoid", 10.0, -10.0)])
def test_scale_and_bias_start_as_published(objective, scale, bias):
    head = LogitScale(objective)
    assert float(head.scale.detach()) == pytest.approx(scale)
    assert (None if head.bias is None else float(head.bias.detach())) == bias


def test_the_scale_stops_at_100():
    head = LogitScale("infonce")
    with torch.no_grad():
        head.log_scale.fill_(9.0)
    assert float(head.scale.detach()) == 100.0


def test_several_texts_by_hand():
    """Image 0 has texts 0 and 1, image 1 has text 2."""
    logits = torch.tensor([[2.0, 1.0, 0.5], [0.0, -1.0, 3.0]])
    positive = torch.tensor([[True, True, False], [False, False, True]])

    def nll(own: float, *negatives: float) -> torch.Tensor:
        return -torch.log_softmax(torch.tensor([own, *negatives]), 0)[0]

    to_texts = ((nll(2.0, 0.5) + nll(1.0, 0.5)) / 2 + nll(3.0, 0.0, -1.0)) / 2
    to_images = (nll(2.0, 0.0) + nll(1.0, -1.0) + nll(3.0, 0.5)) / 3
    torch.testing.assert_close(infonce_loss(logits, positive), (to_texts + to_images) / 2)
    signs = positive.float() * 2 - 1
    by_hand = sum(-F.logsigmoid(signs[i, j] * logits[i, j]) for i in range(2) for j in range(3)) / 3
    torch.testing.assert_close(sigmoid_loss(logits, positive), by_hand)


def test_two_texts_of_a_image_do_not_push_each_other_away():
    images = unit(2, 0)
    texts = torch.stack([images[0], images[0], images[1]]).requires_grad_()
    loss = contrastive_loss(
        "infonce", LogitScale("infonce"), images, texts, torch.tensor([0, 1]), torch.tensor([0, 0, 1])
    )
    masked = float(loss.detach())
    naive = F.cross_entropy(LogitScale("infonce")(images, texts)[:1], torch.tensor([0]))
    assert float(naive.detach()) > 0.69, "as a negative, the twin costs log 2"
    assert masked < 0.01


def test_the_order_of_texts_does_not_matter():
    images, texts, owners = unit(4, 0), unit(9, 1), torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    head = LogitScale("infonce")
    one = contrastive_loss("infonce", head, images, texts, torch.arange(4), owners)
    other = contrastive_loss("infonce", head, images, texts[order], torch.arange(4), owners[order])
    torch.testing.assert_close(one, other)


def test_batches_that_cannot_teach_are_refused():
    with pytest.raises(DataError, match="one image of the batch has no partner"):
        infonce_loss(torch.zeros(2, 2), torch.tensor([[True, True], [False, False]]))
    with pytest.raises(DataError, match="no negative; give at least two different images"):
        infonce_loss(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))


# ── gradient caching ──


class Tower(nn.Module):
    def __init__(self, seed: int, dropout: float):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.net(x), dim=-1)


@pytest.mark.parametrize("objective", ["infonce", "sigmoid"])
def test_cached_gradient_is_the_whole_batchs(objective):
    towers, head = nn.ModuleList([Tower(0, 0.0), Tower(1, 0.0)]), LogitScale(objective)
    x, y = torch.randn(10, 5), torch.randn(20, 5)
    ids, owners = torch.arange(10), torch.arange(20) // 2
    parameters = [*towers.parameters(), *head.parameters()]

    def loss_of(images, texts):
        return contrastive_loss(objective, head, images, texts, ids, owners)

    whole = loss_of(towers[0](x), towers[1](y))
    expected = torch.autograd.grad(whole, parameters)
    value = cached_contrastive_step(towers[0], x.split(4), towers[1], y.split(3), loss_of)
    torch.testing.assert_close(value, whole.detach())
    for parameter, reference in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, reference, rtol=0, atol=1e-5)


def test_the_second_pass_drops_out_the_same():
    """With one chunk a side, dropout falls as in the plain step, so the gradients must be equal."""
    towers, head = nn.ModuleList([Tower(0, 0.5), Tower(1, 0.5)]), LogitScale("infonce")
    x, y, ids = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6)

    def loss_of(images, texts):
        return contrastive_loss("infonce", head, images, texts, ids, ids)

    torch.manual_seed(3)
    loss_of(towers[0](x), towers[1](y)).backward()
    following = torch.rand(1)
    expected = [p.grad.clone() for p in towers.parameters()]
    towers.zero_grad()
    torch.manual_seed(3)
    cached_contrastive_step(towers[0], [x], towers[1], [y], loss_of)
    assert torch.equal(torch.rand(1), following)
    for parameter, reference in zip(towers.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, reference, rtol=0, atol=1e-5)


def test_a_frozen_tower_is_left_alone():
    frozen, trained = Tower(0, 0.0).requires_grad_(False), Tower(1, 0.0)
    ids = torch.arange(4)
    head = LogitScale("infonce")
    cached_contrastive_step(
        frozen,
        [torch.randn(4, 5)],
        trained,
        [torch.randn(4, 5)],
        lambda a, b: contrastive_loss("infonce", head, a, b, ids, ids),
    )
    assert all(p.grad is None for p in frozen.parameters())
    assert all(p.grad is not None for p in trained.parameters())


# ── several processes ──

_WORKER = """
import sys, torch, torch.distributed as dist
from frozenprefix.models.contrastive.losses import LogitScale, contrastive_loss
from tests.helpers import ROOT
rank, out, port = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.manual_seed(0)
weight = torch.nn.Parameter(torch.randn(5, 4))
head = LogitScale("infonce")
x, y = torch.randn(4, 5), torch.randn(7, 5)
ids, owners = torch.arange(4), torch.tensor([0, 1, 1, 2, 2, 3, 3])
images, texts = (slice(0, 2), slice(0, 3)) if rank == 0 else (slice(2, 4), slice(3, 7))
unit = lambda t: torch.nn.functional.normalize(t @ weight, dim=-1)
loss = contrastive_loss("infonce", head, unit(x[images]), unit(y[texts]), ids[images], owners[texts])
loss.backward()
for p in (weight, head.log_scale):
    dist.all_reduce(p.grad)
    p.grad /= 2
whole = contrastive_loss.__globals__["LOSSES"]["infonce"](head(unit(x), unit(y)), ids[:, None] == owners[None])
expected = torch.autograd.grad(whole, [weight, head.log_scale])
torch.testing.assert_close(loss, whole)
torch.testing.assert_close(weight.grad, expected[0], rtol=0, atol=1e-5)
torch.testing.assert_close(head.log_scale.grad, expected[1], rtol=0, atol=1e-5)
open(f"{out}/{rank}", "w").write("same")
dist.destroy_process_group()
"""


def test_two_processes_give_the_loss_and_gradient_of_one(tmp_path):
    """With different numbers of texts on each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(rank), str(tmp_path), port],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_one_process_gathers_nothing():
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows
