"""What a training says of itself while it runs, and where it stops: at the first loss or gradient that is not finite."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback

from LLMPruner.errors import RunError
from LLMPruner.memory import peak_memory

logger = logging.getLogger("LLMPruner")

ADVICE = "use LoRA (--use_lora --lora_target_attention --lora_target_mlp --lr 2e-4), a lower learning rate, or --dtype float32"


@dataclass(frozen=True)
class Pace:
    """What turns steps into figures: this process's tokens so far, FLOPs of a token, and this device's FLOPs a second."""

    tokens: Callable[[], int]
    token_flops: float
    peak_flops: float
    processes: int = 1


class Progress(TrainerCallback):
    """Plain log lines with the pace and the time left."""

    def __init__(self, pace: Pace, device: torch.device) -> None:
        self.pace, self.device = pace, str(device)
        self.since, self.step, self.tokens = time.perf_counter(), 0, 0
        self.stopped = self.since  # when the last step was over: checks and checkpoints are not training

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.since, self.step, self.tokens = time.perf_counter(), state.global_step, self.pace.tokens()
        self.stopped = self.since

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on."""
        self.since += time.perf_counter() - self.stopped

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.stopped = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One line; the Trainer's closing summary, which has no loss of a step, is left out."""
        if not logs or "loss" not in logs:
            return
        now, done = self.stopped, state.global_step - self.step
        tokens = self.pace.tokens()
        rate = (tokens - self.tokens) * self.pace.processes / max(now - self.since, 1e-9)
        share = rate * self.pace.token_flops / (self.pace.peak_flops * self.pace.processes)
        left = (state.max_steps - state.global_step) * (now - self.since) / max(done, 1)
        self.since, self.step, self.tokens = now, state.global_step, tokens
        logger.info(
            "step %d of %d  loss %.4f  lr %.2e  %s tokens/s (%.0f%% of peak)  %.1f GB  %s left",
            state.global_step,
            state.max_steps,
            logs["loss"],
            logs["learning_rate"],
            f"{rate:,.0f}",
            100 * share,
            peak_memory(self.device) / 1e9,
            f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s",
        )


class Watch(TrainerCallback):
    """Looks at every step's gradient on the device, and reads what it found only where a step is logged or kept."""

    def __init__(self, every: int, looks: int, kept: str, last_loss: Callable[[], torch.Tensor]) -> None:
        self.last_loss = last_loss
        # steps between checkpoints; checkpoints from one look at held-out text to the next; where the last one is, in words
        self.every, self.looks, self.kept = every, looks, kept
        self.broken: torch.Tensor | None = None  # the first step whose gradient was not finite, 0: none

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Note a gradient that is not finite (float16's loss scaling skips such a step). Raises RunError where there was one
        by a step that is logged or kept, before it gets into the weights."""
        if args.fp16:
            return
        step = state.global_step + 1
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if self.broken is None:
            self.broken = torch.zeros((), dtype=torch.int64, device=norm.device)
        self.broken = torch.where((self.broken == 0) & ~torch.isfinite(norm), step, self.broken)
        due = step == 1 or step % args.logging_steps == 0 or self._kept(step, state)
        if due and int(self.broken):
            lost = not math.isfinite(float(self.last_loss()))
            what = "training loss became nan" if lost else "gradient became infinite, or no number,"
            raise RunError(f"the {what} in step {int(self.broken)}: {ADVICE}{self.kept}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step is kept too, and every step that is kept is logged: a continued curve has the same points."""
        if self._kept(state.global_step, state):
            control.should_log = control.should_save = True
            look = state.global_step == state.max_steps or state.global_step // self.every % self.looks == 0
            control.should_evaluate = look and args.eval_strategy != "no"

    def _kept(self, step: int, state: Any) -> bool:
        return step == state.max_steps or step % self.every == 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Raises RunError for a loss that is not finite."""
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise RunError(f"the training loss became {loss} by step {state.global_step}: {ADVICE}{self.kept}")


class Bar(ProgressCallback):
    """The bar alone: what it would print beside it is in the log lines already."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Nothing."""
