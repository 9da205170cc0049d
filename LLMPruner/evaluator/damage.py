"""What pruning did to the residual stream, layer by layer beside the dense model, and what to do about it. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from LLMPruner.config import require_at_least, setting
from LLMPruner.errors import UsageError

RATIO = 10.0  # a token's stream so many times as long as it should be is reported
# Mean KL, nats a token. A hundredth is one percent of PPL, what another draw of calibration windows changes. At two the dense
# model's own continuations are seven times less likely: PPL 12 becomes 80, the most that fine-tuning is reported to recover.
NEGLIGIBLE_KL, LARGE_KL = 0.01, 2.0
HALF = 0.5  # of all damage in one layer: the others together did less


@dataclass(frozen=True)
class DiagnosisConfig:
    """The text that both models read."""

    dataset: str | None = setting(
        None, "corpus (its test split) or local text file that both models are compared on; default: a short built-in text"
    )
    samples: int = setting(8, "windows of it")
    seq_len: int = setting(512, "tokens of such a window")

    def __post_init__(self) -> None:
        if self.dataset == "":
            raise UsageError("--dataset needs a corpus or the path of a local text file")
        require_at_least("--samples", self.samples, 1)
        require_at_least("--seq_len", self.seq_len, 2)


@dataclass(frozen=True)
class Damage:
    """The streams of a pruned and of its dense model on the same tokens, after every layer.

    `cosines` and `distances` (length of the difference over length of the dense stream) are means over tokens; `ratios`: how
    many times as long as in the dense model a token's stream is at most. `before`: the distance of what enters layer 0. `kl`:
    KL(dense || pruned), nats a token. Not finite where a stream is not.
    """

    text: str
    tokens: int
    before: float
    cosines: tuple[float, ...]
    distances: tuple[float, ...]
    ratios: tuple[float, ...]
    kl: float

    @property
    def increases(self) -> tuple[float, ...]:
        """What each layer adds to the distance; below zero where the stream comes nearer again."""
        return tuple(after - before for before, after in zip((self.before, *self.distances[:-1]), self.distances, strict=True))

    @property
    def shares(self) -> tuple[float, ...]:
        """Of all that layers add to the distance, the part of each; zeros where none adds any."""
        added = [max(0.0, increase) for increase in self.increases]
        return tuple(part / (sum(added) or 1.0) for part in added)

    @property
    def worst(self) -> int:
        """The layer that adds most."""
        return max(range(len(self.shares)), key=self.shares.__getitem__)

    @property
    def longest(self) -> int:
        """The layer after which a token's stream is too long by most."""
        return max(range(len(self.ratios)), key=self.ratios.__getitem__)

    @property
    def broken(self) -> int | None:
        """The first layer after which a figure is not finite; the last one where only the KL is not."""
        rows = zip(self.cosines, self.distances, self.ratios, strict=True)
        ill = (index for index, row in enumerate(rows) if not all(map(math.isfinite, row)))
        return next(ill, None if math.isfinite(self.kl) else len(self.ratios) - 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; only where nothing is `broken`."""
        columns = {
            "cosine": self.cosines,
            "distance": self.distances,
            "increase": self.increases,
            "share": self.shares,
            "longest_token": self.ratios,
        }
        layers = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return {"text": self.text, "tokens": self.tokens, "kl": self.kl, "before": self.before, "layers": layers}


def next_step(damage: Damage, kept: Sequence[float]) -> str:
    """One sentence: what the numbers ask for. `kept` is the share of every layer's parameters that is left."""
    if damage.ratios[damage.longest] >= RATIO:
        return (
            "false massive activations: prune again with --repair least_squares on more calibration text "
            "(--repair_samples, --self_samples)"
        )
    if damage.kl < NEGLIGIBLE_KL:
        return "nothing: the model says what the dense one says"
    worst, share = damage.worst, damage.shares[damage.worst]
    if share >= HALF and len(kept) > 1:
        if kept[worst] >= 1.0:
            return (
                f"layer {worst} lost nothing and adds {share:.0%} of the damage, so it amplifies what came before: prune again "
                "on more calibration text (--repair_samples, --self_samples)"
            )
        return f"layer {worst} holds {share:.0%} of the damage: {spared(worst, len(kept))}"
    if damage.kl >= LARGE_KL:
        return "the damage is large and everywhere: prune again with a lower --pruning_ratio"
    return "recover with test_finetuning.py --use_lora: the damage is spread and small enough to be trained away"


def spared(layer: int, count: int) -> str:
    """How a pruning of `count` layers leaves `layer` whole, with as few others as can be."""
    if layer + 1 <= count // 4:
        return f"prune again with --layer_start {layer + 1}, which keeps it whole"
    if layer >= count - count // 4:
        return f"prune again with --layer_end {layer}, which keeps it whole"
    return f"prune again with --freeze_top_n_layers high enough that layer {layer} stays whole"
