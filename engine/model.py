"""The GPT, and only the GPT: no device, no strategy, no data.

Shapes: B batch, T tokens, C n_embd, H heads, D head width, V vocabulary, S cache entries.
Parameter names are GPT-2's, so weights come and go without a table. Weights are cast to the activations' dtype
where they are used, so one model runs with fp32 weights and bf16 activations, or all in one dtype.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.config import ModelConfig
from kernels import (
    add_layer_norm,
    attention,
    attention_decode,
    attention_packed,
    bias_activation,
    layer_norm,
    linear_cross_entropy,
    rotary,
)


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far: (n_layer, B, S, H, D) each, `length` entries filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    @classmethod
    def empty(
        cls, config: ModelConfig, batch_size: int, size: int, device: torch.device, dtype: torch.dtype
    ) -> "KVCache":
        shape = (config.n_layer, batch_size, size, config.n_head, config.head_dim)
        return cls(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """LayerNorm of the residual stream, with the addition of the branch that ends there: its norm, and the stream."""

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        if branch is None:
            return layer_norm(x, self.weight, self.bias, eps=self.eps), x
        return add_layer_norm(branch, x, self.weight, self.bias, eps=self.eps)


class ActivatedLinear(nn.Linear):
    """A linear layer whose bias and activation are one operation, recomputed in the backward pass."""

    def __init__(self, in_features: int, out_features: int, bias: bool, activation: str) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return bias_activation(F.linear(x, self.weight.to(x.dtype)), bias, self.activation)


class Head(nn.Linear):
    """The language-model head: logits, or with `targets` the mean loss without holding the logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.n_embd, config.vocab_size, bias=config.head_bias)
        self.z_loss = config.z_loss

    def forward(self, x: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if targets is None:
            return F.linear(x, weight, bias)
        z_loss = self.z_loss if self.training else 0.0
        rows, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
        return linear_cross_entropy(rows, weight, targets, bias=bias, z_loss=z_loss, reduction=reduction)


class Attention(nn.Module):
    """Causal self-attention in H heads of D: (B, T, C) to (B, T, C), C = H D.

    rope: rotary tables. doc_start, int32 (B, T): attention begins there. cache: keys and values of earlier tokens.
    """

    # An instance may have its own, as the one that engine/strategy/activations.py gives.
    attend = staticmethod(attention_packed)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head, self.head_dim = layer, config.n_head, config.head_dim
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, doc_start: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        B, T, C = x.shape
        # (B, T, 3C): queries, keys, values, each H heads of D. No view, as a linear layer returns of three dimensions:
        # of one that is rotated in place autograd would copy the gradient four times.
        qkv = torch.ops.aten._unsafe_view(self.c_attn(x.flatten(0, 1)), (B, T, 3 * C))
        if rope is not None:
            qkv = rotary(qkv, *rope, n_head=2 * self.n_head, head_dim=self.head_dim)
        qkv = qkv.view(B, T, 3, self.n_head, self.head_dim)
        y = self.attend(qkv, doc_start=doc_start) if cache is None else self._cached(qkv, cache)
        return self.c_proj(y.reshape(B, T, C))

    def _cached(self, qkv: Tensor, cache: KVCache) -> Tensor:
        q, k, v = qkv.unbind(2)  # (B, T, H, D), views
        end = cache.length + q.shape[1]
        keys, values = cache.keys[self.layer], cache.values[self.layer]  # (B, S, H, D)
        keys[:, cache.length : end], values[:, cache.length : end] = k, v
        if cache.length == 0:
            return attention(q, k, v)
        return attention_decode(q, keys, values, end)


class MLP(nn.Module):
    """Two matrices and the activation between, four times as wide: (B, T, C) to (B, T, C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = ActivatedLinear(config.n_embd, 4 * config.n_embd, config.bias, config.activation)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x))


class Block(nn.Module):
    """Attention and MLP, each on the normed residual stream and added to it: (B, T, C) to (B, T, C).

    Takes and returns the stream and the last branch, which the next norm adds to it in its own pass over memory.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        doc_start: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        h, x = self.ln_1(x, branch)
        h, x = self.ln_2(x, self.attn(h, rope, doc_start, cache))
        return x, self.mlp(h)


def rotary_tables(length: int, head_dim: int, device: torch.device, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Return cos and sin, fp32 (length, head_dim / 2), of rotary positions (Su et al., RoFormer, 2021)."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


class _Uninitialised(TorchFunctionMode):
    """Within it layers leave their parameters as they are: even without memory torch would import its compiler."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__module__", "") == nn.init.__name__:
            return (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


class GPT(nn.Module):
    """A decoder-only transformer with pre-normalisation (GPT-2's layout).

    `dtype` is that of the activations; None means that of the weights.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd)})
        if config.positions == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer["ln_f"] = LayerNorm(config.n_embd, eps=config.norm_eps)
        self.lm_head = Head(config)
        if config.tie_head:
            self.lm_head.weight = self.transformer["wte"].weight
        self._rope: tuple[Tensor, Tensor] | None = None

    @classmethod
    def outline(cls, config: ModelConfig, dtype: torch.dtype | None = None) -> "GPT":
        """Return a model on the meta device: parameters with shapes and no memory, for others to place and fill."""
        with torch.device("meta"), _Uninitialised():
            return cls(config, dtype)

    def initial_weights(self, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name and GPT-2's initial weights for it, fp32 in host memory, drawn when asked for.

        normal(0, 0.02), the residual projections smaller by sqrt(2 n_layer); biases 0, norms 1.
        """
        # Taken beforehand: what fills the parameters may cut them up.
        shapes = {name: parameter.shape for name, parameter in self.named_parameters()}
        for name, shape in shapes.items():
            weight = torch.empty(shape, dtype=torch.float32)
            if len(shape) < 2:
                yield name, weight.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
            else:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                yield name, weight.normal_(std=std, generator=generator)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        doc_start: Tensor | None = None,
        cache: KVCache | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Return logits (B, T, V), or with `targets` (int64 (B, T), -100 ignored) the loss in fp32.

        tokens: int64 (B, T). doc_start: int32 (B, T), where each token's document begins; None: no document masking.
        cache: filled with these tokens, which follow the `cache.length` that it holds; logits are then (B, 1, V), the
        last token's. reduction: "mean" or "sum" -> a scalar, "none" -> (B * T,).
        """
        start = cache.length if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit the context of {self.config.block_size}")
        x = self.transformer["wte"](tokens)  # (B, T, C)
        if self.config.positions == "learned":
            x = x + self.transformer["wpe"](torch.arange(start, end, device=tokens.device))
        x = x.to(self.dtype or x.dtype)
        rope = self._rotary(start, end, tokens.device) if self.config.positions == "rotary" else None
        branch = None
        for block in self.transformer["h"]:
            x, branch = block(x, branch, rope, doc_start, cache)
        if cache is not None:
            cache.length = end
            x, branch = x[:, -1:], branch[:, -1:]
        h, _ = self.transformer["ln_f"](x, branch)
        return self.lm_head(h, targets, reduction)

    def _rotary(self, start: int, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._rope is None or self._rope[0].device != device:
            self._rope = rotary_tables(self.config.block_size, self.config.head_dim, device)
        return self._rope[0][start:end], self._rope[1][start:end]

    def num_parameters(self) -> int:
        """Return the number of trained numbers, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())


def flops_per_token(config: ModelConfig, n_parameters: int) -> int:
    """Return the FLOPs of a training step per token: 6 N + 12 n_layer n_embd T (PaLM, 2022, appendix B).

    N counts every weight but learned positions, which multiply nothing, and an untied input embedding. Attention is
    counted in full, as is the custom, though a causal kernel does half of it.
    """
    lookups = config.block_size * config.n_embd * (config.positions == "learned")
    lookups += config.vocab_size * config.n_embd * (not config.tie_head)
    return 6 * (n_parameters - lookups) + 12 * config.n_layer * config.n_embd * config.block_size
