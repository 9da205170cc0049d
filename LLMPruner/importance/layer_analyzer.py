"""One importance score per layer, the larger the more the model needs it; saved and re-used for any ratio."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    def load(cls, path: Path, fingerprint: str, num_layers: int) -> LayerImportance:
        """Read the scores back. Raises UsageError when the file is missing, malformed, or of another model."""
        data = read_json_file(path, "--layer_importance_config")
        try:
            loaded = cls(**data | {"scores": tuple(float(score) for score in data["scores"])})
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

    The prefix before each layer is computed once and re-used, so L removals cost L/2 forwards, not L.
    """
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    hidden = runner.embed(windows)
    without = []
    for index in _progress(runner):
        without.append(runner.head.losses(runner.layers(hidden, index + 1), windows).sum().item() / tokens)
        hidden = runner.layer(index, hidden)
    base = runner.head.losses(hidden, windows).sum().item() / tokens
    return [loss - base for loss in without]


def block_influence(runner: LayerRunner, windows: torch.Tensor) -> list[float]:
    """One minus the mean cosine of a layer's input and output (ShortGPT, Men et al. 2024)."""
    import torch

    hidden, scores = runner.embed(windows), []
    for index in _progress(runner):
        output = runner.layer(index, hidden)
        scores.append(1 - torch.cosine_similarity(hidden.float(), output.float(), dim=-1).mean().item())
        hidden = output
    return scores


def activation(runner: LayerRunner, windows: torch.Tensor) -> list[float]:
    """The mean norm of what a layer adds to the residual stream, relative to the stream's own norm."""
    hidden, scores = runner.embed(windows), []
    for index in _progress(runner):
        output = runner.layer(index, hidden)
        change = (output - hidden).float().norm(dim=-1) / hidden.float().norm(dim=-1).clamp_min(1e-12)
        scores.append(change.mean().item())
        hidden = output
    return scores


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


def _progress(runner: LayerRunner) -> Any:
    from tqdm import tqdm

    return tqdm(range(runner.num_layers), desc="layer importance", disable=None, leave=False)
