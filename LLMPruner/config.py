"""The settings of each script as frozen dataclasses that check themselves; `cli.py` makes the flags from their fields.

A field made by `setting` is a flag of the same name: its default, its help text and the group it stands in are said here and
nowhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from LLMPruner.errors import UsageError

TEXT_FORMATS = ("clean", "raw")  # what they are says data/corpora.py
STREAM = ("auto", "on", "off")


def setting(default: Any, help: str, group: str | None = None) -> Any:
    """A field that is a flag; `group` is the heading it stands under in `--help`, that of the field before where None."""
    return field(default=default, metadata={"help": help, "group": group})


def require_at_least(flag: str, value: float, minimum: int) -> None:
    """Raise UsageError naming `flag` unless `value >= minimum`."""
    if value < minimum:
        raise UsageError(f"{flag} must be {minimum} or more, got {value}")


@dataclass(frozen=True)
class CommonConfig:
    """What every script shares: seed, precision, device, and where local corpora lie."""

    seed: int = setting(42, "seed of every random choice")
    dtype: str = setting("auto", "precision of the weights; auto: bfloat16 where the hardware is fast at it, else float32")
    device: str = setting("auto", "cpu, cuda, cuda:N, mps; auto: the GPU where there is one")
    data_dir: str | None = setting(
        None, "folder with local corpora (wikitext-2-raw/test.txt and the like), looked at before the hub"
    )
    text_format: str = setting(
        "clean",
        "how rows become one text; clean: without empty rows and line ends; raw: all as they come, as papers measure PPL",
    )
    stream: str = setting("auto", "leave weights on disk and read them layer by layer; auto: where they do not fit the device")
    hidden_gb: float | None = setting(
        None, "of a streamed model's hidden states stay in main memory, the rest on disk; default: half of what is free"
    )

    def __post_init__(self) -> None:
        if self.stream not in STREAM:
            raise UsageError(f"--stream must be {', '.join(STREAM)}, got {self.stream}")
        if self.hidden_gb is not None and not 0 <= self.hidden_gb < math.inf:
            raise UsageError(f"--hidden_gb must be 0 or more, got {self.hidden_gb}")
        if not 0 <= self.seed < 2**32:  # numpy, which the Trainer seeds, takes no more
            raise UsageError(f"--seed must lie between 0 and {2**32 - 1}, got {self.seed}")
        if self.text_format not in TEXT_FORMATS:
            raise UsageError(f"--text_format must be {' or '.join(TEXT_FORMATS)}, got {self.text_format}")

    def split(self, name: str) -> str:
        """A split as records name it: with the text format where that is not the usual one."""
        return name if self.text_format == "clean" else f"{name} ({self.text_format} text)"


@dataclass(frozen=True)
class EvalConfig:
    """How perplexity is measured: corpora, window length, how many windows (0 = the whole split), and how they overlap."""

    datasets: tuple[str, ...] = setting(("wikitext2",), "corpora to report PPL on")
    seq_len: int = setting(128, "tokens of an evaluation window")
    samples: int = setting(0, "windows spread evenly over the test split; 0: all")
    text_format: str = "clean"  # that of the run: CommonConfig has the flag
    stride: int | None = None  # tokens from window to window, of which the last that many count; None: side by side

    def __post_init__(self) -> None:
        if not self.datasets:
            raise UsageError("--eval_datasets needs at least one corpus")
        require_at_least("--eval_seq_len", self.seq_len, 2)
        require_at_least("--eval_samples", self.samples, 0)


@dataclass(frozen=True)
class EfficiencyConfig:
    """How speed is measured."""

    prompt_tokens: int = setting(512, "tokens of the prompt that prefill is timed on")
    new_tokens: int = setting(32, "tokens decoded")
    repeats: int = setting(5, "timed repeats, interleaved over the models; the median counts")
    decode_context: int = 64

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "repeats"):
            require_at_least("--efficiency_" + name, getattr(self, name), 1)


PLAN_FILE, PROVENANCE_FILE = "pruning_plan.json", "provenance.json"  # of an experiment, and of an exported directory
# What an export is called inside its folder.
EXPORT_FORMATS = {"hf": "hf", "gguf": "model.gguf", "padded": "padded"}
GGUF_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")


@dataclass(frozen=True)
class ExportConfig:
    """Formats to export, keys of EXPORT_FORMATS, and the precision of a GGUF (auto: the weights' own)."""

    formats: tuple[str, ...] = ()
    gguf_type: str = "auto"

    def __post_init__(self) -> None:
        if len(set(self.formats)) != len(self.formats):
            raise UsageError("a format to export is named twice")
        if self.gguf_type != "auto" and "gguf" not in self.formats:
            raise UsageError(f"--gguf_type {self.gguf_type} needs gguf among the formats to export")


# The published methods as points of one space, and the best one. `best` also repairs on more text, a fifth of it the model's
# own, and distills on it, block by block and then as a whole, which costs minutes and no quality elsewhere.
PRESETS: dict[str, dict[str, str | int]] = {
    "seed": {"importance": "taylor", "pruning_strategy": "inverse", "repair": "none"},
    "llm-pruner": {"importance": "taylor", "pruning_strategy": "uniform", "repair": "none"},
    "wanda-sp": {"importance": "wanda", "pruning_strategy": "uniform", "repair": "none"},
    "flap": {"importance": "flap", "pruning_strategy": "global", "repair": "bias", "repair_samples": 32},
    "osscar": {"importance": "obs", "pruning_strategy": "uniform", "repair": "least_squares", "repair_samples": 32},
    "best": {
        "importance": "taylor",
        "pruning_strategy": "search",
        "repair": "least_squares",
        "repair_samples": 256,
        "self_samples": 64,
        "distill_epochs": 1,
        "distill_model_epochs": 1,
    },
}


# Settings of what is learned after the closed forms.
DISTILLATION = ("distill_epochs", "distill_model_epochs", "distill_last", "distill_labels")
AFTER_SEARCH = ("repair_samples", "self_samples", *DISTILLATION)  # what no search depends on

# What units are worth shows on less text than what weights are best: a repair has hundreds of thousands of them to fit.
REPAIR_SHARE = 2


@dataclass(frozen=True)
class PruneConfig:
    """What to remove and how: the three choices (importance, allocation, repair) and their settings."""

    pruning_ratio: float = setting(0.25, "fraction of the parameters to remove, in (0, 1)", "budget")
    prune_attention: bool = setting(True, "prune KV groups")
    prune_mlp: bool = setting(False, "prune MLP channels")
    ratio_base: str = setting(
        "auto",
        "base of the ratio; auto: the model when attention and MLP of all layers are pruned, else the selected sublayers",
    )
    round_to: int | None = setting(None, "keep channels in multiples of this; default: from the width, 256 at 8B")
    layer_start: int = setting(0, "first layer to prune")
    layer_end: int | None = setting(None, "layer to stop before; default: all layers")

    layer_importance_method: str = setting("removal", "how layers are scored", "layers")
    layer_importance_samples: int = setting(50, "windows for the layer scores")
    layer_importance_seq_len: int = setting(128, "tokens of such a window")
    pruning_strategy: str = setting("inverse", "how scores become rates")
    layer_importance_weight: float = setting(1.0, "how strongly scores steer the rates; 0: uniform")
    min_pruning_rate: float = setting(0.0, "least share a pruned sublayer loses")
    max_pruning_rate: float = setting(0.8, "largest share a pruned sublayer loses")
    freeze_top_n_layers: int = setting(0, "the N most important layers stay whole")
    layer_importance_file: str | None = None  # scores to re-use instead of analysing

    search_generations: int | None = setting(
        None, "generations after the start, each a measured shift of every sublayer; default: 2 on a GPU, 1 on a CPU", "search"
    )
    search_tokens: int | None = setting(
        None, "held-out tokens that KL is measured on, half written by the dense model; default: 24576 on a GPU, 6144 on a CPU"
    )
    search_minutes: float | None = setting(
        None,
        "minutes until the best plan so far is taken, once every sublayer was measured; default: no clock, one seed, one plan",
    )
    allow_sublayer_removal: bool = setting(False, "a whole attention or MLP may go")

    importance: str = setting("taylor", "how KV groups and channels are scored", "units and repair")
    repair: str = setting("least_squares", "how what is left is healed")
    channel_importance_samples: int = setting(32, "calibration windows for unit scores")
    repair_samples: int | None = setting(
        None, f"calibration windows for the repair; default: {REPAIR_SHARE} times as many as for the unit scores"
    )
    self_samples: int = setting(0, "windows that the dense model writes itself, added to those of the repair, if any")
    distill_epochs: int = setting(0, "passes of blockwise distillation, of hidden states, on the repair's windows, if any")
    distill_model_epochs: int = setting(0, "passes after that in which all layers learn next-token distributions together")
    distill_last: int | None = setting(None, "of all layers only so many at the end do; default: all")
    distill_labels: float = setting(
        0.5, "share of the text's own next tokens in what those learn; the rest is the dense model's"
    )
    calibration_seq_len: int = setting(512, "tokens of a calibration window")
    calibration_dataset: str = setting("wikitext2", "corpus to calibrate on (its train split), or a local text file")
    calibration_bos: str = setting("auto", "whether calibration windows begin with BOS; auto: where the tokenizer adds it")

    def __post_init__(self) -> None:
        if not 0 < self.pruning_ratio < 1:
            raise UsageError(f"--pruning_ratio must lie in (0, 1), got {self.pruning_ratio}")
        if not (self.prune_attention or self.prune_mlp):
            raise UsageError("nothing to prune: --no_prune_attention needs --prune_mlp")
        for name in ("round_to", "repair_samples", "distill_last"):
            if getattr(self, name) is not None:
                require_at_least("--" + name, getattr(self, name), 1)
        for name in ("self_samples", "distill_epochs", "distill_model_epochs"):
            require_at_least("--" + name, getattr(self, name), 0)
        if self.distill_last is not None and not self.distill_model_epochs:
            raise UsageError("--distill_last needs --distill_model_epochs")
        if not 0 <= self.distill_labels <= 1:
            raise UsageError(f"--distill_labels must lie between 0 and 1, got {self.distill_labels}")
        for name in ("layer_importance_samples", "channel_importance_samples"):
            require_at_least("--" + name, getattr(self, name), 1)
        for name in ("layer_importance_seq_len", "calibration_seq_len"):
            require_at_least("--" + name, getattr(self, name), 2)
        if not (math.isfinite(self.layer_importance_weight) and self.layer_importance_weight >= 0):
            raise UsageError(f"--layer_importance_weight must be 0 or more, got {self.layer_importance_weight}")
        if not 0 <= self.min_pruning_rate <= self.max_pruning_rate <= 1:
            raise UsageError(
                "--min_pruning_rate and --max_pruning_rate must satisfy 0 <= min <= max <= 1, "
                f"got {self.min_pruning_rate} and {self.max_pruning_rate}"
            )
        require_at_least("--freeze_top_n_layers", self.freeze_top_n_layers, 0)
        for name, minimum in (("search_generations", 0), ("search_tokens", 2)):
            if getattr(self, name) is not None:
                require_at_least("--" + name, getattr(self, name), minimum)
        if self.search_minutes is not None and not (math.isfinite(self.search_minutes) and self.search_minutes > 0):
            raise UsageError(f"--search_minutes must be a positive number, got {self.search_minutes}")
        if self.allow_sublayer_removal and self.pruning_strategy != "search":
            raise UsageError("--allow_sublayer_removal needs --pruning_strategy search")

    @property
    def search_seconds(self) -> float:
        """Seconds after which the best plan so far is taken."""
        return math.inf if self.search_minutes is None else 60 * self.search_minutes

    @property
    def repair_windows(self) -> int:
        """Calibration windows for the repair."""
        return self.repair_samples or REPAIR_SHARE * self.channel_importance_samples

    @property
    def search_seq_len(self) -> int:
        """Tokens of a held-out window of the search; no longer than a calibration window, which fits the model's positions."""
        return min(512, self.search_tokens or 512, self.calibration_seq_len)

    def sized(self, device: str) -> PruneConfig:
        """The settings with what depends on the type of the device.

        A GPU measures a KL on four times as many tokens in no more time, and plans chosen on them depend less on the seed. On a
        CPU a second generation takes a quarter of the search and found 0.7% less KL in one of three draws, nothing in two.
        """
        tokens, generations = (6144, 1) if device == "cpu" else (24576, 2)
        asked = self.search_generations
        return replace(
            self,
            search_tokens=self.search_tokens or tokens,
            search_generations=generations if asked is None else asked,
        )

    @property
    def search_windows(self) -> tuple[int, int]:
        """Held-out windows of the search: how many of the corpus, and how many that the dense model writes."""
        count = self.search_tokens // self.search_seq_len
        return count - count // 2, count // 2

    def layer_range(self, num_layers: int) -> range:
        """The layers to prune. Raises UsageError where the range is empty or leaves the model."""
        end = num_layers if self.layer_end is None else self.layer_end
        if not (0 <= self.layer_start < num_layers and 0 < end <= num_layers):
            raise UsageError(
                f"--layer_start {self.layer_start} --layer_end {end} leaves the model, "
                f"which has layers 0 to {num_layers - 1} (the end is exclusive)"
            )
        if self.layer_start >= end:
            raise UsageError(f"--layer_start {self.layer_start} --layer_end {end} selects no layer: the end is exclusive")
        return range(self.layer_start, end)
