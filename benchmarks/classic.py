"""The baseline: what the classic train-llm-from-scratch script computes, spelt out. Naive heads, fp32, whole logits."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Head(nn.Module):
    """x: (B, T, C). Returns (B, T, D) of one head, its scores (B, T, T) held whole."""

    def __init__(self, n_embd: int, head_dim: int, block_size: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(n_embd, head_dim, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        scores = self.query(x) @ self.key(x).transpose(-2, -1) / math.sqrt(self.key.out_features)
        return scores.masked_fill(self.tril[:T, :T] == 0, -math.inf).softmax(-1) @ self.value(x)


class Attention(nn.Module):
    """x: (B, T, C), and so what is returned: heads one after the other, laid side by side."""

    def __init__(self, n_head: int, n_embd: int, block_size: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(n_embd, n_embd // n_head, block_size) for _ in range(n_head))
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


class MLP(nn.Module):
    """x: (B, T, C), and so what is returned; 4 C wide inside."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.hidden, self.proj = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.hidden(x)))


class Block(nn.Module):
    """x: (B, T, C), and so what is returned: norms before, residuals around."""

    def __init__(self, n_head: int, n_embd: int, block_size: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn, self.mlp = Attention(n_head, n_embd, block_size), MLP(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class ClassicGPT(nn.Module):
    """tokens, targets: int64 (B, T). Returns the logits (B, T, V), and with targets the mean loss beside them."""

    def __init__(self, *, n_layer: int, n_head: int, n_embd: int, block_size: int, vocab_size: int) -> None:
        super().__init__()
        self.token_embed, self.position_embed = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.attn_blocks = nn.ModuleList(Block(n_head, n_embd, block_size) for _ in range(n_layer))
        self.layer_norm = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size)
        self.register_buffer("pos_idxs", torch.arange(block_size))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.token_embed(tokens) + self.position_embed(self.pos_idxs[: tokens.shape[1]])
        for block in self.attn_blocks:
            x = block(x)
        logits = self.lm_head(self.layer_norm(x))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
