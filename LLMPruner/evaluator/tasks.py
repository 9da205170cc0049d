"""Zero-shot and few-shot tasks through lm-evaluation-harness, on the model in memory. The package is optional.

What `lm_eval --model hf` gives on an export is what this gives on the model: its HFLM wraps the model as it is, the tokenizer
decides about BOS, and the seeds are lm_eval's own.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.config import require_at_least, setting
from LLMPruner.errors import UsageError, one_line
from LLMPruner.evaluator import task_index
from LLMPruner.evaluator.results import Figure
from LLMPruner.files import existing_path

if TYPE_CHECKING:
    from LLMPruner.model.load import LoadedModel

logger = logging.getLogger("LLMPruner")

STANDARD = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
CHANCE = {"boolq": 0.5, "piqa": 0.5, "winogrande": 0.5}
CHANCE |= {"hellaswag": 0.25, "arc_easy": 0.25, "arc_challenge": 0.25, "openbookqa": 0.25}


@dataclass(frozen=True)
class TaskConfig:
    """Which tasks, and how they are asked. The batch size is fixed: sums of floats depend on it in their last digits."""

    tasks: tuple[str, ...] = setting(
        (), f"tasks of lm-evaluation-harness, paths of task YAMLs, or standard: {' '.join(STANDARD)}", "tasks"
    )
    limit: int | None = setting(None, "examples of each task, the first ones; default: all")
    num_fewshot: int | None = setting(None, "examples in the prompt; default: what the task says, else none")
    apply_chat_template: bool = setting(False, "put the questions into the model's chat template")
    task_batch_size: int = setting(8, "requests that go through the model together")

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("num_fewshot", 0), ("task_batch_size", 1)):
            if getattr(self, name) is not None:
                require_at_least(f"--{name}", getattr(self, name), least)
        for entry in () if self.tasks else fields(self):
            if getattr(self, entry.name) != entry.default:
                raise UsageError(f"--{entry.name} needs --tasks")

    @property
    def files(self) -> list[Path]:
        """The YAMLs among them."""
        return [existing_path(name, "--tasks") for name in self.names if task_index.is_path(name)]

    @property
    def names(self) -> list[str]:
        """The tasks with `standard` as what it stands for, each once."""
        return list(dict.fromkeys(name for given in self.tasks for name in (STANDARD if given == "standard" else [given])))


@dataclass(frozen=True)
class LoadedTask:
    """A task with its examples, or the tasks of a group and the groups that put their metrics together."""

    name: str
    leaves: tuple[Any, ...]
    groups: Mapping[str, Any] = field(default_factory=dict)

    def fingerprint(self, config: TaskConfig) -> str:
        """A hash of what is asked: the examples, those that may stand in the prompt, the words around them, and how groups put
        their tasks together."""
        digest = hashlib.sha256()
        for name, group in self.groups.items():
            said = [name, group.child_names, group.aggregate_metric_list]
            digest.update(json.dumps(said, sort_keys=True, default=_said).encode())
        for task in self.leaves:
            settings = task.config.to_dict()
            settings["metadata"] = {"version": task.VERSION}  # not the path that it was read from
            rows: list[Any] = [settings, *islice(task.eval_docs, config.limit)]
            if (config.num_fewshot or settings.get("num_fewshot") or 0) > 0:
                rows += list(task.fewshot_docs())
            for row in rows:
                digest.update(json.dumps(row, sort_keys=True, default=_said).encode())
        return digest.hexdigest()[:32]

    def chance(self, config: TaskConfig) -> float | None:
        """The share that guessing gets right; None where it is not known."""
        if self.name in CHANCE:
            return CHANCE[self.name]
        if len(self.leaves) != 1 or not _one_of_choices(self.leaves[0]):
            return None
        task = self.leaves[0]
        return guessing(len(task.doc_to_choice(doc)) for doc in islice(task.eval_docs, config.limit))


def _one_of_choices(task: Any) -> bool:
    """Whether a question is right where the one right choice was taken, and lm_eval itself counts so."""
    several = getattr(task, "multiple_target", True)  # of tasks that are classes of their own nothing is known
    own = callable(getattr(task.config, "process_results", None))  # truthfulqa_mc2, for one
    return task.OUTPUT_TYPE == "multiple_choice" and not several and not own


def guessing(choices: Iterable[int]) -> float | None:
    """The mean share right of one who guesses among so many choices; None where a question has none."""
    counts = list(choices)
    return sum(1 / count for count in counts) / len(counts) if counts and all(counts) else None


def _said(value: Any) -> Any:
    """What JSON has no word for: a function by its name, a dataclass by its fields, anything else as it prints."""
    if is_dataclass(value):
        return vars(value)
    return getattr(value, "__qualname__", None) or str(value)


def check_tasks(config: TaskConfig) -> None:
    """Raise UsageError where lm_eval is missing, or a task is unknown; no model, no data and no torch are needed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--tasks needs lm-evaluation-harness: pip install lm_eval")
    paths = [name for name in config.names if task_index.is_path(name)]
    for path in paths:
        if not existing_path(path, "--tasks").is_file():
            raise UsageError(f"--tasks {path} does not exist: give a task's name or the path of its YAML")
    names = [name for name in config.names if name not in paths]
    known = set(task_index.manager(bool(names)).all_tasks)
    for name in names:
        if name not in known:
            raise UsageError(f"--tasks {name} is no task of lm_eval {task_index.version()}: `lm_eval ls tasks` lists them")


def load_tasks(config: TaskConfig) -> list[LoadedTask]:
    """The tasks with their examples, before any model is loaded. Raises UsageError where one cannot be read."""
    with task_index.index(config.names) as (manager, specs):
        return _loaded(manager, specs)


def _loaded(manager: Any, specs: Mapping[str, str]) -> list[LoadedTask]:
    found: dict[str, LoadedTask] = {}
    for name, spec in specs.items():
        try:
            with task_index.quiet():
                loaded = manager.load([spec])
            parts = _parts(tuple(loaded["tasks"].values()), loaded.get("groups", {}))
        except Exception as error:  # yaml, datasets, the hub and tasks' own code raise kinds of their own
            raise UsageError(f"--tasks {name} cannot be loaded: {type(error).__name__}: {one_line(error)[:200]}") from error
        for part in parts:
            _check_asked(part)
            if part.name in found:
                raise UsageError(f"--tasks names {part.name} twice: give each task once")
            found[part.name] = part
    return list(found.values())


def _check_asked(task: LoadedTask) -> None:
    """Raise UsageError for a task that lm_eval would refuse once the model is loaded."""
    for leaf in task.leaves:
        if not (leaf.has_test_docs() or leaf.has_validation_docs()):
            raise UsageError(f"--tasks {task.name}: {leaf.task_name} has neither a test nor a validation split")
        if getattr(leaf, "UNSAFE_CODE", False) or getattr(leaf, "MULTIMODAL", False):
            raise UsageError(f"--tasks {task.name}: {leaf.task_name} runs code or shows pictures, which is not done here")


def _parts(leaves: tuple[Any, ...], groups: Mapping[str, Any]) -> list[LoadedTask]:
    """A group as one, by its own name, which comes before those of groups in it; tasks of a tag or a file each by itself."""
    if groups:
        return [LoadedTask(next(iter(groups)), leaves, groups)]
    return [LoadedTask(leaf.task_name, (leaf,)) for leaf in leaves]


def measure_task(loaded: LoadedModel, task: LoadedTask, config: TaskConfig, label: str) -> list[Figure]:
    """All metrics of a task, logged one line each."""
    from lm_eval.models.huggingface import HFLM

    with task_index.quiet():
        tokenizer = copy.deepcopy(loaded.tokenizer)  # to which lm_eval gives a padding token
        model = HFLM(pretrained=loaded.model, tokenizer=tokenizer, batch_size=config.task_batch_size)
        found = _asked(model, task, config)
    figures = figures_of(found, task, task.chance(config))
    for figure in figures:
        error = "" if figure.stderr is None else f" (stderr {figure.stderr:.4f})"
        shots = figure.facts["num_fewshot"]
        logger.info("task %s on %s: %s %.4f%s, %s-shot", label, figure.facts["task"], figure.metric, figure.value, error, shots)
        if config.num_fewshot not in (None, shots):
            logger.warning("task %s fixes its examples in the prompt: %s, whatever --num_fewshot says", task.name, shots)
    return figures


def _asked(model: Any, task: LoadedTask, config: TaskConfig) -> Mapping[str, Any]:
    """What lm_eval finds, seeded and asked as by its command line.

    Not through its `simple_evaluate`, which after every call looks for 10 seconds at what is installed.
    """
    import numpy
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate

    random.seed(DEFAULT_RANDOM_SEED)
    numpy.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for leaf in task.leaves:
        own = leaf.get_config("num_fewshot")
        if own != 0:  # a task that says 0 means it
            leaf.set_config(key="num_fewshot", value=(own or 0) if config.num_fewshot is None else config.num_fewshot)
        leaf.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return evaluate(
        lm=model,
        task_dict={"tasks": {leaf.task_name: leaf for leaf in task.leaves}, "groups": dict(task.groups)},
        limit=config.limit,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.apply_chat_template,
        log_samples=False,
    )


def figures_of(found: Mapping[str, Any], task: LoadedTask, chance: float | None) -> list[Figure]:
    """The metrics in what lm_eval returns: those of the group where it has any, else those of each of its tasks."""
    rows: Mapping[str, Mapping[str, Any]] = found["results"]
    names = [task.name] if _metrics(rows.get(task.name, {})) else [leaf.task_name for leaf in task.leaves]
    figures = []
    for name in names:
        row, better = rows[name], found["higher_is_better"].get(name, {})
        counts = found["n-samples"].get(name, {})
        for key, value in _metrics(row).items():
            metric, _, kind = key.partition(",")
            facts = {"task": name, "version": found["versions"].get(name), "num_fewshot": found["n-shot"].get(name)}
            facts |= {"samples": counts.get("effective", row.get("sample_len")), "higher_is_better": better.get(metric)}
            facts |= {"chance": chance if metric in CHOICES else None}
            figures.append(Figure(metric if kind == "none" else key, value, _number(row.get(f"{metric}_stderr,{kind}")), facts))
    return figures


CHOICES = ("acc", "acc_norm", "acc_bytes")  # metrics that guessing among the choices has a share of


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row that are metrics: `acc,none`, but neither its error nor what the row is called."""
    pairs = ((key, _number(value)) for key, value in row.items() if "," in key and "_stderr," not in key)
    return {key: value for key, value in pairs if value is not None}


def _number(value: Any) -> float | None:
    """A plain number; None for lm_eval's "N/A"."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number else None


def shown_metric(metrics: Sequence[str]) -> str:
    """The metric that tables show of a task: acc_norm where it has one, as papers do, else acc, else its first."""
    return next((metric for metric in ("acc_norm", "acc") if metric in metrics), metrics[0])
