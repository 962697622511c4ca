"""ClipCap's model, written here from the paper and with the names of its published state dicts (Mokady et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel


class Mlp(nn.Module):
    """Linear, tanh, linear (section 3.2)."""

    def __init__(self, features: int, width: int, length: int):
        super().__init__()
        hidden = width * length // 2
        self.model = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, width * length))

    def forward(self, vectors: Tensor) -> Tensor:
        return self.model(vectors)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        depth = width // self.heads
        queries = self.to_queries(x).reshape(batch, length, self.heads, depth)
        pairs = self.to_keys_values(x).reshape(batch, length, 2, self.heads, depth)
        keys, values = pairs[:, :, 0], pairs[:, :, 1]
        weights = (torch.einsum("bnhd,bmhd->bnmh", queries, keys) * depth**-0.5).softmax(dim=2)
        return self.project(torch.einsum("bnmh,bmhd->bnhd", weights, values).reshape(batch, length, width))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, 8)
        self.norm2, self.mlp = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Transformer(nn.Module):
    """A projected vector and learned constants attend to each other; the constants are the prefix (section 3.3)."""

    def __init__(self, features: int, width: int, length: int, layers: int = 2):
        super().__init__()
        self.length = length
        self.transformer = Stack(width, layers)
        self.linear = nn.Linear(features, length * width)
        self.prefix_const = nn.Parameter(torch.randn(length, width))

    def forward(self, vectors: Tensor) -> Tensor:
        visual = self.linear(vectors).view(len(vectors), self.length, -1)
        constants = self.prefix_const.expand(len(vectors), -1, -1)
        return self.transformer(torch.cat((visual, constants), dim=1))[:, self.length :]


class ClipCap(nn.Module):
    """Prefix in front of the words' embeddings; state dict with `clip_project.*` and `gpt.*`."""

    def __init__(self, gpt: GPT2LMHeadModel, kind: str, features: int, length: int):
        super().__init__()
        self.gpt, self.length, self.width = gpt, length, gpt.config.n_embd
        self.clip_project = (Mlp if kind == "mlp" else Transformer)(features, self.width, length)

    @torch.no_grad()
    def forward(self, tokens: Tensor, vectors: Tensor) -> Tensor:
        prefix = self.clip_project(vectors).view(-1, self.length, self.width)
        words = self.gpt.transformer.wte(tokens)
        return self.gpt(inputs_embeds=torch.cat((prefix, words), dim=1)).logits
