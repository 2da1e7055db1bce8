"""Everything on one device: fp32 weights and moments, computing in the run's dtype."""
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from engine.config import Config, ConfigError
from engine.data import Batch
from engine.distributed import Processes
from engine.model import GPT
from engine.optimizer import AdamW, clip_coefficient, parameter_groups
from engine.strategy import StepResult
from engine.strategy.activations import checkpoint_blocks
from engine.strategy.loss_scaling import LossScale


class Resident:
    def __init__(self, config: Config, model: GPT, processes: Processes, device: torch.device, dtype: torch.dtype) -> None:
        if processes.world_size > 1:
            raise ConfigError(f"--strategy resident runs in one process, not {processes.world_size}: use --strategy zero")
        self.device, self.dtype = device, dtype
        self.model = model.to(device)
        self.model.dtype = dtype
        self.checkpointing = config.strategy.activation_checkpointing
        if self.checkpointing:
            checkpoint_blocks(self.model)
        self.module = torch.compile(self.model) if config.strategy.compile else self.model
        options = config.optimizer
        self.grad_clip = options.grad_clip
        groups = parameter_groups(self.model, options.weight_decay)
        self.optimizer = AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.adam_eps)
        self.parameters = dict(self.model.named_parameters())
        self.loss_scale = LossScale() if dtype == torch.float16 else None
        self.updates = 0

    def describe(self) -> str:
        recomputed = "; every block recomputed in the backward pass" if self.checkpointing else ""
        return f"resident: fp32 weights and AdamW moments on the device{recomputed}"

    def forward_backward(self, batches: list[Batch]) -> Tensor:
        total = torch.zeros((), device=self.device)
        scale = (self.loss_scale.value if self.loss_scale else 1.0) / len(batches)
        for batch in batches:
            batch = batch.to(self.device)
            loss = self.module(batch.tokens, batch.targets, doc_start=batch.doc_start)
            (loss * scale).backward()
            total += loss.detach()
        return total / len(batches)

    def step(self, lr: float, loss: Tensor) -> StepResult:
        scale = self.loss_scale.value if self.loss_scale else 1.0
        # The gradients still carry the loss scale: clip in scaled units, and let the optimizer divide it out.
        norm, coefficient = clip_coefficient(self.parameters.values(), self.grad_clip * scale or float("inf"))
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step(grad_scale=coefficient / scale, found_inf=(~finite).float())
        self.optimizer.zero_grad(set_to_none=True)
        skipped = not finite.item()
        self.updates += not skipped
        if self.loss_scale:
            self.loss_scale.update(skipped)
        return StepResult(grad_norm=norm.item() / scale, skipped=skipped)

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter] if self.updates else {}
            yield name, {"weight": parameter.detach()} | {k: moments[k] for k in ("exp_avg", "exp_avg_sq") if k in moments}

    def load_state(self, read: Callable[[str, str], Tensor]) -> None:
        saved = self.optimizer.state_dict()
        for index, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            name = next(n for n, p in self.parameters.items() if p is parameter)
            with torch.no_grad():
                parameter.copy_(read(name, "weight"))
            if self.updates:
                saved["state"][index] = {"step": torch.tensor(float(self.updates))} | {k: read(name, k) for k in ("exp_avg", "exp_avg_sq")}
        self.optimizer.load_state_dict(saved)

    def counters(self) -> dict[str, Any]:
        scale = {"value": self.loss_scale.value, "good_steps": self.loss_scale.good_steps} if self.loss_scale else None
        return {"updates": self.updates, "loss_scale": scale}

    def load_counters(self, counters: dict[str, Any]) -> None:
        self.updates = counters["updates"]
        if self.loss_scale and counters["loss_scale"]:
            self.loss_scale.value, self.loss_scale.good_steps = counters["loss_scale"]["value"], counters["loss_scale"]["good_steps"]
