"""What the teacher says of each token, drawn once and kept on disk, so that teacher and student need not be in memory together.

Of every next-token distribution some tokens are drawn, with replacement. The mean over them is an unbiased estimate of the
divergence's gradient, which the most likely tokens alone are not (Anshumann et al. 2025, arXiv 2503.16870).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from LLMPruner import parallel
from LLMPruner.files import write_atomically
from LLMPruner.model.finished import is_marked
from LLMPruner.model.head import chunk_tokens
from LLMPruner.training_config import DistillConfig

if TYPE_CHECKING:
    from LLMPruner.model.forward import LayerRunner

logger = logging.getLogger("LLMPruner")

GROUP = 64  # windows in a file: what is drawn anew where a process died


class DrawnAnswers:
    """The answers of windows in the order they were drawn in; files of another `mark` do not count."""

    def __init__(self, folder: Path, mark: str) -> None:
        self.folder, self.mark = folder, mark
        self._open: dict[int, Any] = {}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Of one window of `seq_len` tokens: `tokens` int32 `(seq_len, draws)` and `entropy` float32 `(seq_len,)`, nats."""
        group = index // GROUP
        if group not in self._open:
            self._open[group] = safe_open(self._path(group), framework="pt")
        return {name: self._open[group].get_slice(name)[index % GROUP] for name in ("tokens", "entropy")}

    def has(self, group: int) -> bool:
        """Whether a group of windows was drawn already."""
        return is_marked(self._path(group), self.mark)

    def write(self, group: int, answers: dict[str, torch.Tensor]) -> None:
        """Keep a group's answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(group), lambda path: save_file(answers, path, metadata={"run": self.mark}))

    def _path(self, group: int) -> Path:
        return self.folder / f"answers_{group:06d}.safetensors"


def draw_answers(
    runner: Callable[[], LayerRunner], windows: torch.Tensor, config: DistillConfig, kept: DrawnAnswers, *, seed: int
) -> DrawnAnswers:
    """Let the teacher answer `windows` `(n, seq_len)`; what `kept` has is not asked again, and then `runner` is not called.

    Of several processes each asks its own teacher about its share of the windows.
    """
    groups = parallel.from_main([group for group in range(-(-len(windows) // GROUP)) if not kept.has(group)])
    mine = groups[parallel.share(len(groups))]
    if groups:
        teacher = runner()  # by all processes: they agree on how it is loaded
        for group in tqdm(mine, desc="teacher", unit="group", disable=parallel.quiet(), leave=False):
            place = group * GROUP
            kept.write(group, _answers(teacher, windows[place : place + GROUP], config, seed + place))
    parallel.wait()
    size = sum(path.stat().st_size for path in kept.folder.iterdir())
    logger.info("teacher: %d draws of each of %d answers, %.2f GB", config.teacher_draws, windows.numel(), size / 1e9)
    return kept


@torch.no_grad()
def _answers(runner: LayerRunner, windows: torch.Tensor, config: DistillConfig, seed: int) -> dict[str, torch.Tensor]:
    """The drawn answers to `windows` `(n, seq_len)`: `tokens` int32 `(n, seq_len, draws)`, `entropy` float32 `(n, seq_len)`.

    Each window has a seed of its own: what is drawn does not depend on how many are computed together.
    """
    store, tokens, entropy = runner.store, [], []
    size = chunk_tokens(store.device, store.geometry.vocab_size)
    for part in runner.batches(*windows.shape) if store.resident else [slice(0, len(windows))]:
        hidden = runner.layers(runner.embed(windows[part]))
        for index, window in enumerate(hidden, part.start):
            generator = torch.Generator(store.device).manual_seed(seed + index)
            for rows in window.split(size):
                logits = store.head(store.final_norm(rows.to(store.device))).float() / config.distill_temperature
                chances = logits.log_softmax(-1)
                entropy.append(-(chances.exp() * chances).sum(-1).cpu())
                drawn = torch.multinomial(chances.exp(), config.teacher_draws, replacement=True, generator=generator)
                tokens.append(drawn.int().cpu())
    return {
        "tokens": torch.cat(tokens).view(*windows.shape, -1),
        "entropy": torch.cat(entropy).view(windows.shape),
    }
