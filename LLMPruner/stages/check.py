"""The check on the way out: is the healed model as good as the search saw it, and better than what the defaults give?

A search sees every sublayer healed alone, on the dense model's activations. Healing the whole plan, layer after layer, on more
text, has to do better than that. Where it does not, or left tokens far too long, something went wrong with this draw; then the
defaults' model is made as well, from the dense weights, and the better of the two is taken.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.config import DISTILLATION, PRESETS, PruneConfig
from LLMPruner.data.windows import prune_windows
from LLMPruner.errors import UsageError, one_line
from LLMPruner.importance.budget import make_budget
from LLMPruner.importance.criteria import score_units
from LLMPruner.importance.layer_analyzer import LayerImportance
from LLMPruner.model.load import load_model
from LLMPruner.stages import steps
from LLMPruner.stages.job import PruneJob

if TYPE_CHECKING:
    import torch

    from LLMPruner.model.forward import LayerRunner
    from LLMPruner.model.load import LoadedModel

logger = logging.getLogger("LLMPruner")

SLACK = 1.01  # of the forecast: what was not healed is as good as forecast, but for rounding


@dataclass(frozen=True)
class Verdict:
    """KL(dense || model), nats a token, and how many times as long as in the dense model a token's stream is at most."""

    kl: float
    longest: float


@dataclass(frozen=True)
class Yardstick:
    """What the dense model makes of `windows` `(n, seq_len)` that no repair has seen, and the KL that the search forecast."""

    windows: torch.Tensor
    last: torch.Tensor  # (n, seq_len, hidden), hidden states before the final norm
    lengths: list[torch.Tensor]  # of each layer
    forecast: float

    @classmethod
    def of(cls, runner: LayerRunner, windows: torch.Tensor, forecast: float) -> Yardstick:
        """Taken from the dense model of `runner`."""
        from LLMPruner.evaluator.massive import lengths_and_last

        lengths, last = lengths_and_last(runner, windows)
        return cls(windows, last, lengths, forecast)

    def verdict(self, runner: LayerRunner) -> Verdict:
        """Of the pruned model of `runner`."""
        from LLMPruner.evaluator.massive import largest_ratios, lengths_and_last
        from LLMPruner.importance.search.search import STRIDE

        lengths, last = lengths_and_last(runner, self.windows)
        kl = runner.head.divergence(last[:, ::STRIDE], self.last[:, ::STRIDE])  # where the search looked
        return Verdict(kl, max(largest_ratios(lengths, self.lengths)))

    def holds(self, verdict: Verdict) -> bool:
        """Whether the healed model is what was forecast, or better, and no token far too long; not where either is NaN."""
        from LLMPruner.evaluator.damage import RATIO

        return verdict.kl <= SLACK * self.forecast and verdict.longest <= RATIO


def default_job(job: PruneJob) -> PruneJob | None:
    """The same job by the defaults; None where they cannot meet its budget."""
    ours = {*PRESETS["best"], *DISTILLATION, "allow_sublayer_removal"}
    plain = replace(job.prune, **{field.name: field.default for field in fields(PruneConfig) if field.name in ours})
    try:
        make_budget(job.source.geometry, plain)
    except UsageError:
        return None
    return replace(job, prune=plain)


def make_default(job: PruneJob, loaded: LoadedModel) -> None:
    """Prune and heal the dense model, in place, by the defaults: `job` is of `default_job`."""
    budget, config, runner = make_budget(job.source.geometry, job.prune), job.prune, loaded.runner
    windows = prune_windows(loaded.tokenizer, config, job.common, analyzes=job.analyzes, calibrates=True)
    scores = None
    if job.analyzes:
        scores = steps.score_layers(runner, windows.layers, job).scores
    elif config.layer_importance_file is not None:
        file = Path(config.layer_importance_file)
        scores = LayerImportance.load(file, job.source.fingerprint(), runner.num_layers).scores
    units = score_units(runner, budget.geometry, config.importance, windows=windows.calibration, seed=job.common.seed)
    loaded.plan = steps.plan_by_scores(budget, config, scores, units)
    steps.apply(runner, loaded.plan, windows.repair, config, job.common)


def better(job: PruneJob, loaded: LoadedModel, yardstick: Yardstick, record: dict[str, Any]) -> tuple[PruneJob, LoadedModel]:
    """`job` and its healed model, or, where that is not what was forecast and worse, the defaults' job and model.

    What was found goes into `record`. While both models exist, the device holds both.
    """
    found = yardstick.verdict(loaded.runner)
    record["check"] = {"forecast": yardstick.forecast, "healed": _finite(found)}
    summary = (found.kl, yardstick.forecast, found.longest)
    if yardstick.holds(found):
        logger.info(
            "check: KL %.4f (the search saw %.4f), the longest token %.1f times as long as in the dense model", *summary
        )
        return job, loaded
    logger.warning(
        "check: KL %.4f where the search saw %.4f, a token %.1f times as long as in the dense model: trying the defaults",
        *summary,
    )
    plain = default_job(job)
    if plain is None:
        logger.warning("check: the defaults cannot meet this budget; the model stays")
        return job, loaded
    try:
        other = load_model(job.source, dtype=job.common.dtype, device=job.common.device, tokenizer=loaded.tokenizer)
        make_default(plain, other)
        default = yardstick.verdict(other.runner)
    except (UsageError, MemoryError, RuntimeError) as error:  # what was healed is not lost for want of a second model
        logger.warning("check: the defaults' model cannot be made (%s); the model stays", one_line(error))
        return job, loaded
    record["check"]["default"] = _finite(default)
    kept = math.isfinite(found.kl) and not default.kl < found.kl
    logger.warning("check: the defaults give KL %.4f: %s", default.kl, "the model stays" if kept else "theirs is taken")
    return (job, loaded) if kept else (plain, other)


def _finite(verdict: Verdict) -> dict[str, float | None]:
    """The verdict for a record; JSON knows no infinity."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(verdict).items()}
