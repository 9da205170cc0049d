"""What an evaluation tells beside its figures: what the models say to a prompt, and how fast an engine serves their exports."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner import parallel
from LLMPruner.config import CommonConfig, EfficiencyConfig, require_at_least, setting
from LLMPruner.errors import UsageError
from LLMPruner.evaluator.compare import baseline_first
from LLMPruner.evaluator.engines import EngineConfig, EngineTimes, check_engine, engine_table, time_engine
from LLMPruner.evaluator.results import Figure, Measurement, Record
from LLMPruner.model.source import check_seq_len
from LLMPruner.stages.measurements import Make, Sources, Tokenizers, check_resident

if TYPE_CHECKING:
    from LLMPruner.model.load import LoadedModel

logger = logging.getLogger("LLMPruner")
GENERATION = "generation"  # a kind of measurement that no table shows
NEW_TOKENS = 64


@dataclass(frozen=True)
class GenerateConfig:
    """What every model is asked."""

    generate: str | None = setting(None, "a prompt: what every model says to it, greedily, side by side")
    generate_tokens: int = setting(NEW_TOKENS, "tokens of such an answer at most")

    def __post_init__(self) -> None:
        require_at_least("--generate_tokens", self.generate_tokens, 1)
        if self.generate is None:
            if self.generate_tokens != NEW_TOKENS:
                raise UsageError("--generate_tokens needs --generate PROMPT")
            return
        if not self.generate.strip():
            raise UsageError("--generate needs a prompt that says something")
        if any("\ud800" <= char <= "\udfff" for char in self.generate):  # how Python reads bytes that are no UTF-8
            raise UsageError("--generate needs a prompt in UTF-8")


@dataclass(frozen=True)
class Extras:
    """What is asked for; how long engines are timed is what `--efficiency_*` says."""

    generate: GenerateConfig = GenerateConfig()
    engine: EngineConfig = EngineConfig()
    lengths: EfficiencyConfig = EfficiencyConfig()

    @property
    def prompt(self) -> str | None:
        """What the models answer; None: nothing."""
        return self.generate.generate

    @property
    def asked(self) -> bool:
        """Whether there is anything to do."""
        return self.prompt is not None or self.engine.engine is not None


def check(sources: Sources, extras: Extras) -> None:
    """Raise UsageError for what cannot be done, before torch is imported."""
    for source in sources.values() if extras.prompt is not None else ():
        check_seq_len(source, "--generate_tokens (and a prompt)", extras.generate.generate_tokens + 1)
    if extras.engine.engine is None:
        return
    if parallel.count() > 1:
        raise UsageError("--engine measures one process: run it without the launcher")
    tokens = extras.lengths.prompt_tokens + extras.lengths.new_tokens
    for source in sources.values():
        check_seq_len(source, "--efficiency_prompt_tokens and --efficiency_new_tokens together", tokens)
    check_engine(exports(sources, extras.engine), extras.engine)


def exports(sources: Sources, config: EngineConfig) -> dict[str, Path]:
    """What the engine reads, by the models' names."""
    return config.exports({name: source.path for name, source in sources.items()})


def generation_measurement(
    sources: Sources, tokenizers: Tokenizers, config: GenerateConfig, common: CommonConfig
) -> dict[Measurement, Make]:
    """The answer to the prompt, none where there is no prompt. Raises UsageError for a model that it does not fit."""
    if config.generate is None:
        return {}
    from LLMPruner.evaluator.generate import fitting_ids, generate

    for name, source in sources.items():
        check_resident("--generate", name, source, common)
        fitting_ids(tokenizers[name], source.geometry, config.generate, config.generate_tokens)

    def measured(loaded: LoadedModel, label: str) -> list[Figure]:
        logger.info("generating from %s", label)
        answer = generate(loaded, config.generate, new_tokens=config.generate_tokens)
        return [Figure("tokens", answer.tokens, facts={"answer": answer.as_dict()})]

    return {Measurement(GENERATION, "greedy", {"prompt": config.generate, "tokens": config.generate_tokens}): measured}


def answers(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """What the models said, by name, as plain values."""
    return {record["model"]: record["answer"] for record in records if record["kind"] == GENERATION}


def time_exports(sources: Sources, extras: Extras, common: CommonConfig, baseline: str) -> EngineTimes:
    """Speed in the engine, the others' in ratio to the baseline's. Raises RunError where the engine cannot run a model."""
    import torch

    from LLMPruner.model.device import resolve_device

    gpu = resolve_device(common.device).type == "cuda"
    if gpu:  # the engine is another process: what torch keeps for itself is missing there
        gc.collect()
        torch.cuda.empty_cache()
    paths = baseline_first(exports(sources, extras.engine), baseline)
    logger.info("timing %s in %s", ", ".join(paths), extras.engine.engine)
    return time_engine(paths, extras.engine, extras.lengths, gpu=gpu)


def engine_records(
    times: EngineTimes, sources: Sources, extras: Extras, hardware: str
) -> tuple[Measurement, dict[str, list[Figure]]]:
    """What was timed, as the results file keeps it: figures by model. It is never re-used: another run is another minute."""
    settings = {name: value for name, value in times.as_dict().items() if name not in ("engine", "speeds")}
    settings |= {"threads": extras.engine.engine_threads, "hardware": hardware}
    figures = {}
    for name, path in exports(sources, extras.engine).items():
        figures[name] = [Figure(phase, rate, facts={"export": str(path)}) for phase, rate in asdict(times.speeds[name]).items()]
    return Measurement("engine", times.engine, settings), figures


def view(extras: Extras, records: Sequence[Record], times: EngineTimes | None) -> dict[str, Any]:
    """What the results file says of them; nothing of what was not asked for."""
    said: dict[str, Any] = {}
    if extras.prompt is not None:
        said["generations"] = {"prompt": extras.prompt, "tokens": extras.generate.generate_tokens, "models": answers(records)}
    return said if times is None else said | {"engine": times.as_dict()}


def text(extras: Extras, records: Sequence[Record], times: EngineTimes | None) -> str:
    """What is printed after the tables; empty where nothing was asked for."""
    from LLMPruner.evaluator.generate import Generation, side_by_side

    parts = [] if times is None else [engine_table(times)]
    if extras.prompt is not None:
        found = answers(records)
        generations = [Generation(**answer | {"distinct": _by_size(answer["distinct"])}) for answer in found.values()]
        parts.append(f"Answers to: {extras.prompt}\n" + side_by_side(list(found), generations))
    return "\n\n".join(parts)


def _by_size(shares: Mapping[str, float | None]) -> dict[int, float | None]:
    """JSON's names are text."""
    return {int(size): share for size, share in shares.items()}
