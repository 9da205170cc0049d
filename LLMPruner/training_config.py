"""The settings of recovery: LoRA, distillation, and the training itself; flags are made of them as of those in config.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

from LLMPruner.config import require_at_least, setting
from LLMPruner.errors import UsageError

CHECKS = 10  # of a training, at most, unless the user says when


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al. 2021): rank, scale, dropout, and which sublayers get adapters."""

    r: int = setting(8, "rank")
    alpha: int = setting(16, "scale, usually twice the rank")
    dropout: float = setting(0.05, "dropout on the adapters' inputs")
    use_dora: bool = False  # flags without the prefix, as peft calls them
    use_rslora: bool = False
    target_attention: bool = setting(True, "adapters on q, k, v and o")
    target_mlp: bool = setting(True, "adapters on gate, up and down; no target flag means both")

    def __post_init__(self) -> None:
        require_at_least("--lora_r", self.r, 1)
        require_at_least("--lora_alpha", self.alpha, 1)
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--lora_dropout must lie in [0, 1), got {self.dropout}")
        if not (self.target_attention or self.target_mlp):
            raise UsageError("LoRA needs a target: give --lora_target_attention, --lora_target_mlp, or neither for both")


TEACHER_ANSWERS = ("auto", "beside", "cached")
OPTIMIZERS = ("adamw", "adamw_8bit")
REPORTS = ("none", "tensorboard")


@dataclass(frozen=True)
class DistillConfig:
    """Distillation (Hinton et al. 2015): the student learns the dense model's next-token distributions."""

    distill: bool = setting(False, "learn the dense model's next-token distributions, not the text alone")
    distill_alpha: float = setting(0.5, "share of the divergence in the loss; the rest is cross-entropy on the text")
    distill_temperature: float = setting(1.0, "temperature of both distributions")
    teacher: str | None = setting(None, "the dense model; default: the one that the checkpoint's record names")
    teacher_answers: str = setting(
        "auto", "beside: the teacher runs in every step; cached: its answers are drawn once, to disk; auto: what memory allows"
    )
    teacher_draws: int = setting(50, "tokens drawn of each cached distribution")

    def __post_init__(self) -> None:
        if not 0 < self.distill_alpha <= 1:
            raise UsageError(f"--distill_alpha must lie in (0, 1], got {self.distill_alpha}")
        if not (math.isfinite(self.distill_temperature) and self.distill_temperature > 0):
            raise UsageError(f"--distill_temperature must be a positive number, got {self.distill_temperature}")
        if self.teacher_answers not in TEACHER_ANSWERS:
            raise UsageError(f"--teacher_answers must be {', '.join(TEACHER_ANSWERS)}, got {self.teacher_answers}")
        require_at_least("--teacher_draws", self.teacher_draws, 1)

    @property
    def answer_bytes(self) -> int:
        """Bytes on disk of the teacher's answer to one token: what it drew, and the entropy."""
        return 4 * self.teacher_draws + 4


@dataclass(frozen=True)
class FinetuneConfig:
    """Recovery training. `prefix` is how the script at hand spells its flags, for error messages."""

    method: str = "lora"
    lr: float | None = setting(None, "learning rate; default: 2e-4 for LoRA, 1e-5 for full fine-tuning")
    samples: int = setting(1000, "training windows")
    epochs: int = setting(3, "passes over the training windows")
    seq_len: int = setting(512, "tokens of a training window; use the same for evaluation")
    batch_size: int = setting(1, "windows per device; an optimizer step takes as many times --grad_accum")
    grad_accum: int = setting(4, "batches whose gradients are added up to one step")
    micro_batch: int | None = setting(None, "windows computed at once; default: of a step's all that fit; on a CPU 512 tokens")
    max_grad_norm: float = setting(1.0, "gradient clipping; 0: none")
    warmup_steps: int | None = setting(None, "steps of linear warm-up; default: 100, but at most a tenth of all steps")
    weight_decay: float = setting(0.01, "AdamW weight decay")
    optimizer: str = setting("adamw", "adamw_8bit: moments in 8 bits, by the package bitsandbytes, on a GPU")
    check_steps: int | None = setting(
        None,
        "steps between checkpoints, with the loss on held-out text; default: a tenth of all or more, fewer looks at short runs",
    )
    report_to: str = setting("none", "tensorboard: also write curves for it, below the run's folder")
    dataset: tuple[str, ...] = setting(("wikitext2",), "corpora, files, self (the dense model's text); :WEIGHT may follow")
    lora: LoraConfig = LoraConfig()
    distill: DistillConfig = DistillConfig()
    prefix: str = "--"

    def __post_init__(self) -> None:
        if self.method not in ("lora", "full"):
            raise UsageError(f"{self.prefix}method must be lora or full, got {self.method}")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"{self.prefix}lr must be a positive number, got {self.lr}")
        for name in ("samples", "epochs", "batch_size", "grad_accum"):
            require_at_least(self.prefix + name, getattr(self, name), 1)
        require_at_least(self.prefix + "seq_len", self.seq_len, 2)
        for name, least in (("warmup_steps", 0), ("check_steps", 1), ("micro_batch", 1)):
            if getattr(self, name) is not None:
                require_at_least(self.prefix + name, getattr(self, name), least)
        if self.windows_per_step % (self.micro_batch or 1):
            raise UsageError(
                f"{self.prefix}micro_batch {self.micro_batch} must divide the {self.windows_per_step} windows of "
                f"{self.prefix}batch_size times {self.prefix}grad_accum"
            )
        for name, known in (("optimizer", OPTIMIZERS), ("report_to", REPORTS)):
            if getattr(self, name) not in known:
                raise UsageError(f"{self.prefix}{name} must be {' or '.join(known)}, got {getattr(self, name)}")
        for name in ("max_grad_norm", "weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UsageError(f"{self.prefix}{name} must be 0 or more, got {getattr(self, name)}")

    @property
    def windows_per_step(self) -> int:
        """Windows of an optimizer step of one process."""
        return self.batch_size * self.grad_accum

    def steps(self, windows: int) -> int:
        """Optimizer steps of a training of one process on so many windows."""
        return math.ceil(windows / self.windows_per_step) * self.epochs

    def log_every(self, steps: int) -> int:
        """Steps between two lines of the log of a training of `steps`."""
        return max(1, steps // 20)

    def check_every(self, steps: int) -> int:
        """Steps between checkpoints of a training of `steps`: by default `CHECKS` at most, each with a line due anyway."""
        every = self.log_every(steps)
        return self.check_steps or every * math.ceil(steps / (every * CHECKS))

    def look_every(self, windows: int, held_out: int) -> int:
        """Checkpoints from one look at so many held-out windows to the next, of a training on `windows`.

        A look costs a third of what training on as many windows does; all looks may cost a fifth of the training.
        Whoever sets the steps between checkpoints gets a look at each.
        """
        steps = self.steps(windows)
        checkpoints = math.ceil(steps / self.check_every(steps))
        affordable = max(1, 3 * windows * self.epochs // (5 * max(1, held_out)))
        return 1 if self.check_steps else math.ceil(checkpoints / affordable)

    def warmup(self, steps: int) -> int:
        """Warm-up steps of a training of `steps`: as given, else few enough that a short run is not spent warming up."""
        return min(100, steps // 10) if self.warmup_steps is None else self.warmup_steps

    @property
    def learning_rate(self) -> float:
        """The given rate, or the method's usual one."""
        return self.lr if self.lr is not None else {"lora": 2e-4, "full": 1e-5}[self.method]
