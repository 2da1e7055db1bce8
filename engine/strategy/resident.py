"""Everything in one process: weights in fp32, or in 16 bits with or without a residual; moments in 32, 16 or 8 bits.

Residuals and moments lie on the device, or in host memory (engine/streamed_adamw.py).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from engine.config import Config, require
from engine.data import Batch
from engine.distributed import Processes
from engine.model import GPT
from engine.optimizer import AdamW, InBackwardAdamW, clip_coefficient, parameter_groups, stored_dtype
from engine.strategy import StepResult, give_memory
from engine.strategy.activations import in_words, recompute_blocks
from engine.strategy.data_parallel import average_in_backward, data_parallel
from engine.strategy.loss_scaling import LossScale
from engine.streamed_adamw import StreamedAdamW


class Resident:
    """`Strategy` of states that every process has whole, in the formats that the config names.

    ConfigError where updates inside the backward pass would have to accumulate.
    """

    def __init__(
        self,
        config: Config,
        model: GPT,
        processes: Processes,
        device: torch.device,
        dtype: torch.dtype,
        grad_accum: int,
        weights: Iterable[tuple[str, Tensor]],
    ) -> None:
        self.device, self.processes = device, processes.world_size
        self.options, choices = config.optimizer, config.strategy
        self.formats = {"weights": choices.weights, "moments": choices.moments}
        # Chips that train in fp16 may have no bf16; where the computation is in fp32, bf16 has its range.
        storage = torch.float16 if dtype == torch.float16 else torch.bfloat16
        self.parameters = dict(model.named_parameters())
        for parameter in self.parameters.values():
            stored = stored_dtype(parameter, choices.weights, storage)
            give_memory(parameter, torch.empty(parameter.shape, dtype=stored, device=device))
        self.model = model.to(device)
        self.model.dtype = dtype
        self.streamed = choices.offload == "states"
        adamw = StreamedAdamW if self.streamed else AdamW
        if choices.optimizer_in_backward:
            require(
                grad_accum == 1,
                f"--optimizer_in_backward cannot accumulate over {grad_accum} micro-batches: a smaller --batch_tokens",
            )
            adamw = InBackwardAdamW
            if self.processes > 1:
                average_in_backward(self.model.parameters())
        self.optimizer = adamw(
            parameter_groups(self.model, self.options.weight_decay),
            lr=self.options.lr,
            betas=(self.options.beta1, self.options.beta2),
            eps=self.options.adam_eps,
            dtype=storage,
            seed=config.seed,
            **self.formats,
        )
        for name, weight in weights:
            self.optimizer.import_state(self.parameters[name], weight)
        self.optimizer.allocate_states()
        self.in_backward = choices.optimizer_in_backward
        recomputed = choices.activation_checkpointing, choices.recomputed_blocks
        recompute_blocks(self.model, *recomputed, compiled=choices.compile)
        self.recomputed = in_words(*recomputed)
        self.distributed = data_parallel(self.model) if self.processes > 1 and not self.in_backward else None
        self.module, self.trained = self.model, self.distributed or self.model
        if choices.compile:
            self.module, self.trained = torch.compile(self.module), torch.compile(self.trained)
        self.loss_scale = LossScale() if dtype == torch.float16 else None
        self.updates = 0

    def describe(self) -> str:
        weights = {
            "fp32": "fp32 weights",
            "residual": "16-bit weights and residuals (exact fp32)",
            "stochastic": "16-bit weights, rounded stochastically",
        }
        place = "streamed from host memory" if self.streamed else "on the device"
        parts = [f"resident: {weights[self.formats['weights']]}, {self.formats['moments']} moments, {place}"]
        parts += [f"the same in {self.processes} processes, gradients averaged"] if self.processes > 1 else []
        parts += ["updated inside the backward pass"] if self.in_backward else []
        return "; ".join(parts + ([self.recomputed] if self.recomputed else []))

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def forward_backward(self, batches: list[Batch]) -> Tensor:
        total = torch.zeros((), device=self.device)
        scale = self._scale()
        if self.in_backward:
            self.optimizer.grad_scale = torch.full((), 1 / scale, device=self.device)
        for number, batch in enumerate(batches, start=1):
            batch = batch.to(self.device)
            with self.distributed.no_sync() if self.distributed and number < len(batches) else nullcontext():
                loss = self.trained(batch.tokens, batch.targets, doc_start=batch.doc_start)
                (loss * (scale / len(batches))).backward()
            total += loss.detach()
        return total / len(batches)

    def step(self, loss: Tensor) -> StepResult:
        scale = self._scale()
        if self.in_backward:
            norm = self.optimizer.step()
            finite = torch.isfinite(norm)
        else:
            # The gradients still carry the loss scale: clip in scaled units, and let the optimizer divide it out.
            norm, coefficient = clip_coefficient(
                self.parameters.values(), self.options.grad_clip * scale or float("inf")
            )
            finite = torch.isfinite(norm) & torch.isfinite(loss)
            self.optimizer.step(grad_scale=coefficient / scale, found_inf=(~finite).float())
            self.optimizer.zero_grad(set_to_none=True)
        skipped = not finite.item()
        self.updates += not skipped
        if self.loss_scale:
            self.loss_scale.update(skipped)
        rescaled = skipped and self._scale() < scale and bool(torch.isfinite(loss))
        return StepResult(grad_norm=norm.item() / scale, skipped=skipped, rescaled=rescaled)

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, parameter in self.parameters.items():
            yield name, self.optimizer.export_state(parameter)

    def load_state(self, read: Callable[[str, str], Tensor]) -> None:
        for name, parameter in self.parameters.items():
            moments = {key: read(name, key) for key in ("exp_avg", "exp_avg_sq")} if self.updates else {}
            self.optimizer.import_state(parameter, read(name, "weight"), step=self.updates, **moments)

    def counters(self) -> dict[str, Any]:
        scale = {"value": self.loss_scale.value, "good_steps": self.loss_scale.good_steps} if self.loss_scale else None
        return {"updates": self.updates, "loss_scale": scale}

    def load_counters(self, counters: dict[str, Any]) -> None:
        self.updates = counters["updates"]
        if self.loss_scale and counters["loss_scale"]:
            self.loss_scale.value, self.loss_scale.good_steps = (
                counters["loss_scale"]["value"],
                counters["loss_scale"]["good_steps"],
            )

    def _scale(self) -> float:
        return self.loss_scale.value if self.loss_scale else 1.0
