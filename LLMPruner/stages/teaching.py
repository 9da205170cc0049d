"""The dense model as a teacher: where it is, the text that it writes for a training, and its answers to all of the text."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner import parallel
from LLMPruner.config import CommonConfig
from LLMPruner.data.mixture import SELF, mixture
from LLMPruner.data.training import TrainingText, training_text
from LLMPruner.data.windows import bos_token
from LLMPruner.errors import UsageError
from LLMPruner.memory import available_memory
from LLMPruner.model.device import resolve_device, resolve_dtype
from LLMPruner.model.fit import Streaming, streaming
from LLMPruner.model.load import load_model, load_tokenizer
from LLMPruner.model.source import ModelSource, find_model
from LLMPruner.stages.journal import Journal, kept_windows, mark_of
from LLMPruner.training_config import FinetuneConfig

if TYPE_CHECKING:
    import torch

    from LLMPruner.model.load import LoadedModel
    from LLMPruner.trainer.teacher import DrawnAnswers

logger = logging.getLogger("LLMPruner")

SELF_TEXT = "self_text.safetensors"  # of an experiment: written once
FULL_BYTES = {"adamw": 16, "adamw_8bit": 10}  # of a parameter that is trained: itself and its gradient in float32, two moments
USED = 0.7  # of the free memory, by weights and what belongs to them


def needs_teacher(config: FinetuneConfig) -> bool:
    """Whether a training asks the dense model anything."""
    return config.distill.distill or SELF in (part.name for part in mixture(config))


def find_teacher(source: ModelSource, config: FinetuneConfig) -> ModelSource | None:
    """The dense model of `source`, as asked for or as its record names it; None where a training does not need it.

    Raises UsageError where it is not there, has another vocabulary, or is named and not needed.
    """
    if not needs_teacher(config):
        if config.distill.teacher is not None:
            raise UsageError(f"--teacher has nothing to do: add --distill, or {SELF} to {config.prefix}dataset")
        return None
    path = config.distill.teacher or source.provenance.get("base_model")
    if not path:
        raise UsageError(f"{source.path} does not say which dense model it was pruned from: name it with --teacher")
    try:
        teacher = find_model(str(path), "--teacher")
    except UsageError as error:
        raise UsageError(f"the dense model is needed to learn from ({error}): name it with --teacher") from error
    if teacher.geometry.vocab_size != source.geometry.vocab_size:
        raise UsageError(f"--teacher {teacher.path} has another vocabulary than {source.path}: give its dense model")
    return teacher


class Teacher:
    """The dense model, in memory from when it is first asked, all of it or either way, until it is dropped."""

    def __init__(self, source: ModelSource, common: CommonConfig, folder: Path, tokenizer: Any) -> None:
        self.source, self.common, self.folder, self.tokenizer = source, common, folder, tokenizer
        self._loaded: LoadedModel | None = None
        if load_tokenizer(source).get_vocab() != tokenizer.get_vocab():
            raise UsageError(f"--teacher {source.path} reads other tokens than the model: give its dense model")

    def whole(self) -> LoadedModel:
        """All of it on the device."""
        return self._once(lambda: None)

    def either(self) -> LoadedModel:
        """In memory, or streamed where it does not fit."""
        return self._once(lambda: streaming(self.source, self.common, self.folder))

    def _once(self, stream: Callable[[], Streaming | None]) -> LoadedModel:
        if self._loaded is None:
            settings = {"dtype": self.common.dtype, "device": self.common.device, "tokenizer": self.tokenizer}
            self._loaded = load_model(self.source, stream=stream(), **settings)
        return self._loaded

    def drop(self) -> None:
        """Give its memory back."""
        self._loaded = None
        gc.collect()  # a model may refer to itself


def text(config: FinetuneConfig, common: CommonConfig, dense: ModelSource | None, tokenizer: Any, folder: Path) -> TrainingText:
    """The training text; what the model `dense` writes of it is kept in the experiment's `folder`, and the model is gone."""
    if dense is None:
        return training_text(tokenizer, config, common)
    teacher = Teacher(dense, common, folder, tokenizer)
    found = training_text(tokenizer, config, common, _writer(teacher, folder, config, common.seed))
    teacher.drop()
    return found


def _writer(teacher: Teacher, folder: Path, config: FinetuneConfig, seed: int) -> Callable[[int], torch.Tensor]:
    """`write(count)` for the training text: windows that the dense model writes, or wrote in this experiment before."""

    def write(count: int) -> torch.Tensor:
        from LLMPruner.data.self_text import write_windows

        settings = {"samples": count, "seq_len": config.seq_len, "seed": seed + 2}  # not what the repair and the search read

        def make() -> torch.Tensor:
            loaded = teacher.whole()
            return write_windows(loaded.model, loaded.tokenizer, bos=bos_token(loaded.tokenizer, "auto"), **settings)

        return kept_windows(folder / SELF_TEXT, mark_of([teacher.source.fingerprint(), settings]), make)

    return write


def answers(
    journal: Journal, teacher: Callable[[], LoadedModel], text: TrainingText, config: FinetuneConfig, seed: int
) -> DrawnAnswers:
    """The teacher's answers to all windows of the text, and then to those held out, on disk."""
    import torch

    from LLMPruner.trainer.teacher import DrawnAnswers, draw_answers

    kept = DrawnAnswers(journal.work / "answers", journal.run)
    return draw_answers(lambda: teacher().runner, torch.cat(text.all()), config.distill, kept, seed=seed)


def caches(
    journal: Journal, teacher: ModelSource, config: FinetuneConfig, common: CommonConfig, params: int, *, here: bool = False
) -> bool:
    """Whether the answers are drawn to disk: as asked for, else where both models with a training's state do not fit.

    `params`: of the student, whose weights are in memory already where it is `here`.
    """
    if config.distill.teacher_answers != "auto":
        return config.distill.teacher_answers == "cached"

    def decide() -> bool:
        device = resolve_device(common.device)
        size = resolve_dtype(common.dtype, device).itemsize
        needed = params * (FULL_BYTES[config.optimizer] if config.method == "full" else size)
        needed -= here * params * size
        needed += teacher.plan.total_params * size
        free = parallel.least(available_memory(str(device)))
        logger.info("teacher and student take %.1f GB of %s memory, %.1f GB are free", needed / 1e9, device, free / 1e9)
        return needed > USED * free

    return journal.once("teacher answers on disk", decide)


def disk_bytes(params: int, config: FinetuneConfig) -> int:
    """Bytes that a training keeps on disk while it runs: checkpoints of what is trained, and the teacher's answers."""
    moments = 12 * params * 3 if config.method == "full" else 0  # float32, two that are kept and one that is being written
    asks = config.distill.distill and config.distill.teacher_answers != "beside"
    return moments + asks * config.samples * config.seq_len * config.distill.answer_bytes


def check_packages(config: FinetuneConfig, common: CommonConfig) -> None:
    """Raise UsageError where a setting or the launcher needs what is not here, or there are more processes than windows."""
    for way in ("FSDP", "DeepSpeed"):
        if os.environ.get(f"ACCELERATE_USE_{way.upper()}", "").lower() == "true":  # the launcher's own word
            split = f"a model split over devices ({way})"
            raise UsageError(f"{split} is not trained here: launch with --multi_gpu, each with all of it")
    if config.samples < parallel.count():
        raise UsageError(f"{parallel.count()} processes cannot share {config.prefix}samples {config.samples}: ask for more")
    if config.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise UsageError(f"{config.prefix}report_to tensorboard needs a package: pip install tensorboard")
    if config.optimizer == "adamw_8bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UsageError(f"{config.prefix}optimizer adamw_8bit needs a package: pip install bitsandbytes")
        if resolve_device(common.device).type != "cuda":
            raise UsageError(f"{config.prefix}optimizer adamw_8bit needs a CUDA GPU: use adamw")


def check_memory(params: int, config: FinetuneConfig, common: CommonConfig) -> None:
    """Say what full fine-tuning of so many parameters takes. Raises UsageError where that is more than there is."""
    if config.method != "full":
        return
    device = resolve_device(common.device)
    needed, free = params * FULL_BYTES[config.optimizer], available_memory(str(device))
    what = (
        f"full fine-tuning of {params / 1e9:.2f} billion parameters takes {needed / 1e9:.1f} GB "
        "for weights, gradients and the optimizer's moments"
    )
    if needed > free:
        lora = "--use_lora" if config.prefix == "--" else f"{config.prefix}method lora"
        raise UsageError(f"{what}, and {device} has {free / 1e9:.1f} GB free: use {lora}")
    logger.info("%s; %.1f GB are free", what, free / 1e9)
