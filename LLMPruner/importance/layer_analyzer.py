"""One importance score per layer, the larger the more the model needs it; saved and re-used for any ratio."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner import parallel
from LLMPruner.cost import Cost, Setup, Work
from LLMPruner.errors import RunError, UsageError
from LLMPruner.files import read_json_file, write_json

if TYPE_CHECKING:
    import torch

    from LLMPruner.model.forward import LayerRunner

logger = logging.getLogger("LLMPruner")


@dataclass(frozen=True)
class LayerImportance:
    """Scores of all layers, how they were measured, and the model they belong to."""

    scores: tuple[float, ...]
    method: str
    samples: int
    seq_len: int
    corpus: str
    split: str
    seed: int
    fingerprint: str

    def save(self, path: Path) -> None:
        """Write `layer_importance_config.json`."""
        write_json(path, asdict(self) | {"scores": list(self.scores)})

    @classmethod
    def of(cls, data: dict[str, Any]) -> LayerImportance:
        """From plain values. Raises TypeError, KeyError or ValueError for others."""
        return cls(**data | {"scores": tuple(float(score) for score in data["scores"])})

    @classmethod
    def load(cls, path: Path, fingerprint: str, num_layers: int) -> LayerImportance:
        """Read the scores back. Raises UsageError when the file is missing, malformed, or of another model."""
        data = read_json_file(path, "--layer_importance_config")
        try:
            loaded = cls.of(data)
        except (TypeError, KeyError, ValueError) as error:
            raise UsageError(f"--layer_importance_config {path} is not a layer importance file: {error}") from error
        if loaded.fingerprint != fingerprint or len(loaded.scores) != num_layers:
            raise UsageError(
                f"--layer_importance_config {path} was made for another model: run once without --skip_importance_analysis"
            )
        if not all(math.isfinite(score) for score in loaded.scores):
            raise UsageError(f"--layer_importance_config {path} has scores that are not finite")
        return loaded


def removal(runner: LayerRunner, windows: torch.Tensor) -> list[float]:
    """The rise of the mean loss (nats a token) when a layer is skipped.

    The stream of hidden states that skips a layer branches off before it, so that L removals cost L/2 forwards, not L; all
    streams go through a layer one after the other, so that its weights are read once.
    """
    import torch

    tokens = windows.shape[0] * (windows.shape[1] - 1)
    losses = torch.cat([_losses_without_each(runner, windows[part]) for part in _passes(runner, windows)], 1)
    losses = parallel.gathered(losses.T).T.contiguous()  # (L + 1, n)
    *without, base = (losses.sum(1) / tokens).tolist()
    return [loss - base for loss in without]


def _losses_without_each(runner: LayerRunner, windows: torch.Tensor) -> torch.Tensor:
    """Summed losses of each window without each layer, and with all, float64 `(layers + 1, n)`."""
    import torch

    streams, whole = [], runner.embed(windows)
    for index in range(runner.num_layers):
        with runner.store.layer(index):
            streams = [*(runner.layer(index, stream) for stream in streams), whole]
            whole = runner.layer(index, whole)
    return torch.stack([runner.head.losses(stream, windows) for stream in (*streams, whole)])


def block_influence(runner: LayerRunner, windows: torch.Tensor) -> list[float]:
    """One minus the mean cosine of a layer's input and output (ShortGPT, Men et al. 2024)."""
    import torch

    return _mean_per_layer(runner, windows, lambda before, after: 1 - torch.cosine_similarity(before, after, dim=-1))


def activation(runner: LayerRunner, windows: torch.Tensor) -> list[float]:
    """The mean norm of what a layer adds to the residual stream, relative to the stream's own norm."""
    return _mean_per_layer(
        runner, windows, lambda before, after: (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12)
    )


def _mean_per_layer(
    runner: LayerRunner, windows: torch.Tensor, measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> list[float]:
    """The mean of what `measure` gives each token `(n, seq_len)`, from the float32 streams before and after a layer."""
    import torch

    from LLMPruner.model.hidden import fetch

    sums = torch.zeros(runner.num_layers, dtype=torch.float64)
    for part in _passes(runner, windows):
        hidden = runner.embed(windows[part])
        for index in range(runner.num_layers):
            after = runner.layer(index, hidden)
            for batch in runner.batches(*hidden.shape[:2]):
                pair = (fetch(stream, batch, runner.device).float() for stream in (hidden, after))
                sums[index] += measure(*pair).double().sum().item()
            hidden = after
    return (parallel.summed(sums) / windows.numel()).tolist()


LAYER_METHODS: dict[str, Callable[[LayerRunner, torch.Tensor], list[float]]] = {
    "removal": removal,
    "activation": activation,
    "block_influence": block_influence,
}


def analyze_layers(runner: LayerRunner, windows: torch.Tensor, method: str, **record: Any) -> LayerImportance:
    """Score all layers by `method`; `record` fills the provenance fields of the result."""
    scores = LAYER_METHODS[method](runner, windows)
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise RunError(f"layer {index} has a score of {score}: run diagnose_model.py on the model, or try --dtype float32")
        logger.info("layer %2d importance %.5f (%s)", index, score, method)
    return LayerImportance(tuple(scores), method, windows.shape[0], windows.shape[1], **record)


def _passes(runner: LayerRunner, windows: torch.Tensor) -> Any:
    from tqdm import tqdm

    return tqdm(runner.passes(*windows.shape), desc="layer importance", disable=parallel.quiet(), leave=False)


def cost(setup: Setup, method: str, windows: int, seq_len: int) -> Cost:
    """What scoring the layers costs. Of removal: layer i carries i + 1 streams, and the head all in the end."""
    layers, tokens = setup.geometry.num_layers, setup.mine(windows) * seq_len
    together, batch = setup.together(setup.mine(windows), seq_len), setup.batch(windows, seq_len)
    device = setup.activations(batch)
    if method != "removal":  # two streams in float32 are compared
        work = setup.forward(tokens, seq_len) + Work(traffic=layers * tokens * setup.geometry.hidden_size * 32)
        return Cost("layer importance", work, device, setup.hidden(together, 3), passes=1)
    work = setup.layer(tokens, seq_len) * (layers * (layers + 1) // 2) + setup.head_work(tokens) * (layers + 1)
    hidden = setup.hidden(together, layers + 2)
    return Cost("layer importance", work, max(device, setup.logits(batch)), hidden, passes=1, head=True)
