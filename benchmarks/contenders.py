"""What is compared: our engine and what a person would pick instead, each as a function that runs one training step.

All take the same config, with its open choices made, random tokens, dtype and AdamW, and do the whole step: forward,
backward, clipping, update. Only ours runs in several processes.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from benchmarks.classic import ClassicGPT
from engine.config import Config, ModelConfig
from engine.data import Batch
from engine.distributed import Processes
from engine.model import GPT, flops_per_token, rotary_tables
from engine.strategy import build


@dataclass(frozen=True)
class Step:
    """One optimizer step over micro-batches, `take`, which returns their mean loss; and what its model is.

    n_parameters: trained numbers, tied ones once; flops_per_token: as engine.model counts them, of this model; differs:
    how it is another model than ours, in the words of a table, such as "untied head, ReLU".
    """

    take: Callable[[list[Batch]], Tensor]
    model: nn.Module
    n_parameters: int
    flops_per_token: int
    differs: str = ""

    def __call__(self, batches: list[Batch]) -> Tensor:
        return self.take(batches)


class Unsupported(Exception):
    """This contender cannot express the config or does not run on the device; the message says why."""


def pilesmith(config: Config, device: torch.device, dtype: torch.dtype, grad_accum: int, processes: Processes) -> Step:
    model = GPT.outline(config.model)
    n_parameters = model.num_parameters()  # before it is cut up
    strategy = build(config, model, processes, device, dtype, grad_accum, some_weights(model, config.seed))

    def step(batches: list[Batch]) -> Tensor:
        strategy.set_lr(config.optimizer.lr)
        loss = strategy.forward_backward(batches)
        strategy.step(loss)
        return loss

    return Step(step, model, n_parameters, flops_per_token(config.model, n_parameters))


def some_weights(model: GPT, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter's name and fp32 weights with the spread of GPT-2's, 0.02: a norm's are ones, a bias's zeros.

    One draw of numbers is laid end to end: drawing billions takes minutes, and no speed depends on them.
    """
    numbers = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed)) * 0.02  # prime: no two rows alike
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}  # what fills them may cut them up
    for name, shape in shapes.items():
        if len(shape) < 2:
            yield name, torch.full(shape, 1.0 if "ln_" in name and name.endswith("weight") else 0.0)
            continue
        weight = torch.empty(shape)
        for part in weight.view(-1).split(len(numbers)):
            part.copy_(numbers[: len(part)])
        yield name, weight


class PlainAttention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """x: (B, T, C); rope: cos and sin, each (T, D / 2), None with learned positions. Returns (B, T, C)."""
        B, T, C = x.shape
        # Each (B, H, T, D).
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=-1))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, H, T, D), its halves turned by the angles of cos and sin, each (T, D / 2). Returns x's shape and dtype."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1).to(x.dtype)


class PlainBlock(nn.Module):
    """x, rope and what is returned as of PlainAttention."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attn = PlainAttention(config)
        activation = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}[config.activation]
        up, down = (nn.Linear(i * config.n_embd, o * config.n_embd, bias=config.bias) for i, o in ((1, 4), (4, 1)))
        self.mlp = nn.Sequential(up, activation, down)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rope)
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    """The same GPT as a good plain PyTorch script writes it: SDPA, whole logits.

    tokens, targets: int64 (B, T). Returns the mean loss, fp32 (), in nats a token.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        if config.tie_head:
            self.lm_head.weight = self.wte.weight
        self.head_dim = config.head_dim

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        T, x, rope = tokens.shape[1], self.wte(tokens), None
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(T, device=tokens.device))
        else:
            rope = rotary_tables(T, self.head_dim, tokens.device)
        for block in self.blocks:
            x = block(x, rope)
        return F.cross_entropy(self.lm_head(self.ln_f(x)).flatten(0, 1), targets.flatten())


def pytorch(config: Config, device: torch.device, dtype: torch.dtype, grad_accum: int, processes: Processes) -> Step:
    with device:
        model = PlainGPT(config.model)
    return _plain_step(model, config, dtype)


def pytorch_compiled(
    config: Config, device: torch.device, dtype: torch.dtype, grad_accum: int, processes: Processes
) -> Step:
    with device:
        model = PlainGPT(config.model)
    return _plain_step(torch.compile(model), config, dtype)


def classic(config: Config, device: torch.device, dtype: torch.dtype, grad_accum: int, processes: Processes) -> Step:
    """The classic script's loop: fp32 (autocast in 16 bits, as its --amp), torch's default AdamW, no clipping."""
    shape = config.model
    if shape.positions != "learned":
        raise Unsupported("the classic model has learned positions only")
    with device:
        model = ClassicGPT(
            **{k: getattr(shape, k) for k in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr)
    step = _plain_step(
        model, config, dtype, optimizer=optimizer, clip=0.0, loss=lambda b: model(b.tokens, b.targets)[1],
        shape=replace(shape, tie_head=False),
    )  # fmt: skip
    differs = {"untied head": shape.tie_head, "ReLU": shape.activation != "relu"}
    return replace(step, differs=", ".join(words for words, true in differs.items() if true))


def transformers(
    config: Config, device: torch.device, dtype: torch.dtype, grad_accum: int, processes: Processes
) -> Step:
    """GPT-2 where positions are learned, else GPT-NeoX with sequential residuals, both with SDPA."""
    import transformers as hf

    shape = config.model
    activation = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}[shape.activation]
    if shape.positions == "learned":
        about = hf.GPT2Config(
            vocab_size=shape.vocab_size, n_positions=shape.block_size, n_embd=shape.n_embd, n_layer=shape.n_layer,
            n_head=shape.n_head, activation_function=activation, tie_word_embeddings=shape.tie_head,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    else:
        about = hf.GPTNeoXConfig(
            vocab_size=shape.vocab_size, max_position_embeddings=shape.block_size, hidden_size=shape.n_embd,
            num_hidden_layers=shape.n_layer, num_attention_heads=shape.n_head, intermediate_size=4 * shape.n_embd,
            hidden_act=activation, tie_word_embeddings=shape.tie_head, use_parallel_residual=False, rotary_pct=1.0,
        )  # fmt: skip
    about.use_cache = False
    with device:
        model = hf.AutoModelForCausalLM.from_config(about, attn_implementation="sdpa")
    if config.strategy.activation_checkpointing not in ("auto", "none"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()

    def loss(batch: Batch) -> Tensor:  # labels are shifted by transformers itself: give it the targets, already shifted
        logits = model(input_ids=batch.tokens).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())

    return _plain_step(model, config, dtype, loss=loss)


def transformers_liger(
    config: Config, device: torch.device, dtype: torch.dtype, grad_accum: int, processes: Processes
) -> Step:
    """transformers with Liger-Kernel's LayerNorm and fused linear cross-entropy in place of its own."""
    if device.type != "cuda":
        raise Unsupported("Liger-Kernel needs a GPU")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerLayerNorm

    step = transformers(config, device, dtype, grad_accum, processes)
    model = step.model
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm):
                norm = LigerLayerNorm(child.normalized_shape[0], eps=child.eps).to(device)
                norm.load_state_dict(child.state_dict(), strict=False)
                setattr(parent, name, norm)
    fused, head = LigerFusedLinearCrossEntropyLoss(), model.get_output_embeddings()

    def loss(batch: Batch) -> Tensor:
        hidden = model.base_model(input_ids=batch.tokens).last_hidden_state.flatten(0, 1)
        return fused(head.weight.to(hidden.dtype), hidden, batch.targets.flatten())

    return _plain_step(model, config, dtype, loss=loss)


def _plain_step(
    model: nn.Module,
    config: Config,
    dtype: torch.dtype,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    clip: float | None = None,
    loss: Callable[[Batch], Tensor] | None = None,
    shape: ModelConfig | None = None,
) -> Step:
    """Return the ordinary loop's step: autocast in 16 bits, loss scaling in fp16, fused AdamW, clipping.

    shape: the model's, where it is not the configuration's.
    """
    device = next(model.parameters()).device
    options = config.optimizer
    if optimizer is None:
        betas = (options.beta1, options.beta2)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=options.lr, betas=betas, weight_decay=options.weight_decay, fused=True
        )
    clip = options.grad_clip if clip is None else clip
    compute_loss = loss or (lambda batch: model(batch.tokens, batch.targets))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(batches: list[Batch]) -> Tensor:
        total = torch.zeros((), device=device)
        for batch in batches:
            batch = batch.to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                value = compute_loss(batch)
            scaler.scale(value / len(batches)).backward()
            total += value.detach() / len(batches)
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return total

    n_parameters = sum(p.numel() for p in model.parameters())
    return Step(step, model, n_parameters, flops_per_token(shape or config.model, n_parameters))


CONTENDERS: dict[str, Callable[[Config, torch.device, torch.dtype, int, Processes], Step]] = {
    "pilesmith": pilesmith,
    "pytorch": pytorch,
    "pytorch-compiled": pytorch_compiled,
    "transformers": transformers,
    "transformers-liger": transformers_liger,
    "classic": classic,
}
PACKAGES = {"transformers": ("transformers",), "transformers-liger": ("transformers", "liger-kernel")}


def not_installed(contender: str) -> str:
    """Return the package that a contender needs and that is not there, or nothing."""
    missing = (name for name in PACKAGES.get(contender, ()) if not importlib.util.find_spec(name.replace("-", "_")))
    return next(missing, "")
