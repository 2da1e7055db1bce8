"""DeepSpeed ZeRO stages 0-3, with optimizer or parameters in host memory or on NVMe, in any number of processes."""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from engine import footprint
from engine.config import Config, ConfigError, load_file, merge
from engine.data import Batch
from engine.distributed import Processes
from engine.model import GPT
from engine.optimizer import parameter_groups
from engine.strategy import StepResult, give_memory
from engine.strategy.activations import in_words, recompute_blocks

MOMENTS = ("exp_avg", "exp_avg_sq")
# gloo does what this extension does, and building it takes over a minute at the first run on a CPU.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def deepspeed_config(config: Config, dtype: torch.dtype, grad_accum: int, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration that follows from ours, with `--deepspeed_config FILE` laid over it."""
    strategy, micro_batch_size = config.strategy, config.optimizer.micro_batch_size
    bucket = footprint.DEEPSPEED_BUCKET
    zero: dict[str, Any] = {
        "stage": strategy.zero_stage,
        "overlap_comm": world_size > 1,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
    }
    where: dict[str, Any] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if strategy.nvme_path:
        where = {"device": "nvme", "nvme_path": strategy.nvme_path}
        zero["sub_group_size"] = footprint.DEEPSPEED_SWAPPED
    if strategy.offload != "none":
        zero["offload_optimizer"] = where
    if strategy.offload == "params":
        zero["offload_param"] = where
        if strategy.nvme_path:
            # A buffer must take the largest parameter, and is the parameter's for as long as the device has that.
            largest = -(-footprint.Elements.of(config.model).parameter // world_size)
            zero["offload_param"] = where | {"buffer_size": largest, "max_in_cpu": 0}
            zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum,
        "train_batch_size": micro_batch_size * grad_accum * world_size,
        "gradient_clipping": config.optimizer.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as fast and needs no compiler
        "steps_per_print": 10**9,
    }
    if dtype == torch.bfloat16:
        derived |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    elif dtype == torch.float16:
        derived |= {
            "fp16": {"enabled": True, "initial_scale_power": 16, "hysteresis": 1},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    return merge(derived, load_file(strategy.deepspeed_config)) if strategy.deepspeed_config else derived


class Zero:
    """`Strategy` by DeepSpeed's engine: states shared by the processes, from stage 1 on, and offloaded where asked for.

    ConfigError for stage 0 in 16 bits.
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
        if config.strategy.zero_stage == 0 and dtype != torch.float32:
            raise ConfigError(
                "--zero_stage 0 computes wrong updates in 16 bits: use --zero_stage 1, which is right on one card too"
            )
        # DeepSpeed calls collectives by their old names, once a step.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
        # Pascal (P100, GTX 1080 Ti) stores in fp16 and multiplies in fp32, which DeepSpeed takes for a mistake.
        os.environ.setdefault("DS_ALLOW_DEPRECATED_FP16", "1")
        processes.connect(device)
        self.device, self.dtype = device, dtype
        self.stage, self.offload, self.grad_accum = config.strategy.zero_stage, config.strategy.offload, grad_accum
        self.place = f" on {config.strategy.nvme_path}" if config.strategy.nvme_path else " in host memory"
        recomputed = config.strategy.activation_checkpointing, config.strategy.recomputed_blocks
        recompute_blocks(model, *recomputed)
        self.recomputed = in_words(*recomputed)
        options = config.optimizer
        settings = deepspeed_config(config, dtype, grad_accum, processes.world_size)
        if processes.main:
            path = Path(config.run_dir) / "deepspeed.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings, indent=2) + "\n")
        groups = parameter_groups(model, options.weight_decay)  # by shapes, which stage 3 takes away
        self._place(model, weights, settings)
        optimizer = torch.optim.AdamW(
            groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.adam_eps, fused=True
        )
        self.clip_norm = 0.0
        if self.stage == 0:  # there DeepSpeed cannot skip a step that it is to clip
            self.clip_norm, settings = settings["gradient_clipping"], settings | {"gradient_clipping": 0.0}
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        if self.stage > 0:
            self.engine.optimizer.check_grad_overflow = True  # in fp32 too: a non-finite gradient skips the step
        self.module = self.engine
        self.parameters = dict(self.engine.module.named_parameters())
        self.updates = 0

    def _place(self, model: GPT, weights: Iterable[tuple[str, Tensor]], settings: dict[str, Any]) -> None:
        """Put weights on the device in the compute dtype, for stage 3 partitioned, so that DeepSpeed copies nothing."""
        parameters, shared = dict(model.named_parameters()), None
        if self.stage == 3:
            deepspeed.init_distributed()  # takes the processes that are connected; else it counts only this one
            shared = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings)
        for name, weight in weights:
            # A copy, since a file may lie behind `weight`.
            give_memory(parameters[name], weight.to(self.device, self.dtype, copy=True))
            if shared:
                # Each process keeps its part; the whole is freed.
                shared._convert_to_zero_parameters([parameters[name]])

    def describe(self) -> str:
        moved = {"none": "", "optimizer": ", optimizer", "params": ", optimizer and parameters"}[self.offload]
        recomputed = f"; {self.recomputed}" if self.recomputed else ""
        return (
            f"DeepSpeed ZeRO stage {self.stage}{moved}{moved and self.place}, "
            f"{self.engine.world_size} process{'es' * (self.engine.world_size > 1)}{recomputed}"
        )

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    def forward_backward(self, batches: list[Batch]) -> Tensor:
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, start=1):
            batch = batch.to(self.device)
            loss = self.engine(batch.tokens, batch.targets, doc_start=batch.doc_start)
            self.engine.backward(loss)
            if number < len(batches):
                self.engine.step()  # only counts: the update comes at the accumulation's boundary
            total += loss.detach().float()
        return total / len(batches)

    def step(self, loss: Tensor) -> StepResult:
        norm = None
        if self.stage == 0:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values()])
            if not torch.isfinite(norm):
                self.engine.optimizer.zero_grad(set_to_none=True)  # the step below then finds nothing to do
            elif self.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip_norm, norm)
        scale = self._scale()
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() if norm is None else norm)
        skipped = not math.isfinite(norm) or bool(getattr(self.engine.optimizer, "overflow", False))
        if self.updates == 0 and not skipped and self.stage in (1, 2):
            self._link_moments()
        self.updates += not skipped
        rescaled = skipped and self._scale() < scale and bool(torch.isfinite(loss))
        return StepResult(grad_norm=norm, skipped=skipped, rescaled=rescaled)

    def _scale(self) -> float:
        return float(self.engine.optimizer.cur_scale) if self.dtype == torch.float16 else 1.0

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, parameter in self.parameters.items():
            if self.stage == 0:
                moments = {key: self.engine.optimizer.state[parameter][key] for key in MOMENTS} if self.updates else {}
                yield name, {"weight": parameter.detach()} | moments
            else:
                moments = (
                    {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS} if self.updates else {}
                )
                yield name, {"weight": safe_get_full_fp32_param(parameter)} | moments

    def load_state(self, read: Callable[[str, str], Tensor]) -> None:
        for name, parameter in self.parameters.items():
            if self.stage == 0:
                parameter.data.copy_(read(name, "weight"))
            else:
                safe_set_full_fp32_param(parameter, read(name, "weight").to(self.device))
        # DeepSpeed makes the moments, and copies fp32 weights to the model's own, only within a step: take one that
        # changes nothing, then put the saved moments in the place of its zeros.
        self.set_lr(0.0)
        tokens = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        for _ in range(self.grad_accum):
            self.engine.backward(self.engine(tokens, tokens) * 0.0)
            self.engine.step()
        if not self.updates:
            return
        if self.stage in (1, 2):
            self._link_moments()
        for name, parameter in self.parameters.items():
            for key in MOMENTS:
                value = read(name, key).to(self.device)
                if self.stage == 0:
                    self.engine.optimizer.state[parameter][key].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)
        for state in getattr(self.engine.optimizer, "optimizer", self.engine.optimizer).state.values():
            state["step"].fill_(self.updates)

    def _link_moments(self) -> None:
        """DeepSpeed links parameters to their moments after its first group's first step, too early for the others."""
        self.engine.optimizer._hp_optimizer_states_linked = False
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def counters(self) -> dict[str, Any]:
        scale = {"value": self._scale(), "good_steps": 0} if self.dtype == torch.float16 else None
        return {"updates": self.updates, "loss_scale": scale}

    def load_counters(self, counters: dict[str, Any]) -> None:
        self.updates = counters["updates"]
        if self.dtype == torch.float16 and counters["loss_scale"]:
            self.engine.optimizer.loss_scaler.cur_scale = counters["loss_scale"]["value"]
