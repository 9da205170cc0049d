"""Tasks of lm-evaluation-harness: what is refused before a model is loaded, and what its answer becomes.

That its figures are those of its own command line is proved where it is installed: tests/consumers.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from LLMPruner.errors import UsageError
from LLMPruner.evaluator import tasks
from LLMPruner.evaluator.tasks import (
    CHANCE,
    STANDARD,
    LoadedTask,
    TaskConfig,
    check_tasks,
    figures_of,
    guessing,
    shown_metric,
)


class Little:
    """A task as lm_eval loads one: questions with two and four choices."""

    task_name, OUTPUT_TYPE, VERSION = "little", "multiple_choice", 1.5
    eval_docs = ({"choices": ["a", "b"]}, {"choices": ["a", "b", "c", "d"]}, {"choices": ["a", "b"]})

    def __init__(self, words: str = "query") -> None:
        self.config = SimpleNamespace(to_dict=lambda: {"doc_to_text": words, "metadata": {"config_source": id(self)}})
        self.multiple_target = 0  # right answers of a question, where they are a list

    def doc_to_choice(self, doc):
        return doc["choices"]

    def fewshot_docs(self):
        return [{"choices": ["x"]}]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (("standard",), STANDARD),
        (("arc_easy", "standard", "mine.yaml"), ("arc_easy", *(n for n in STANDARD if n != "arc_easy"), "mine.yaml")),
        (("boolq", "boolq"), ("boolq",)),
    ],
)
def test_standard_stands_for_the_seven_and_each_task_is_asked_once(given, names):
    assert TaskConfig(given).names == list(names) and len(STANDARD) == 7


def test_without_the_package_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--tasks needs lm-evaluation-harness: pip install lm_eval"):
        check_tasks(TaskConfig(("boolq",)))


@pytest.fixture
def installed(monkeypatch):
    """As if lm_eval were there and knew two tasks."""
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: "spec")
    monkeypatch.setattr(tasks, "_manager", lambda defaults: SimpleNamespace(all_tasks=["boolq", "piqa"] if defaults else []))
    monkeypatch.setattr(tasks, "version", lambda: "0.4")


def test_names_and_files_that_are_not_there_are_told_before_anything_is_loaded(installed, tmp_path):
    (tmp_path / "mine.yaml").touch()
    check_tasks(TaskConfig(("boolq", str(tmp_path / "mine.yaml"))))
    with pytest.raises(UsageError, match="--tasks bolq is no task of lm_eval 0.4"):
        check_tasks(TaskConfig(("boolq", "bolq")))
    with pytest.raises(UsageError, match=r"--tasks .*nothere.yaml does not exist"):
        check_tasks(TaskConfig((str(tmp_path / "nothere.yaml"),)))


@pytest.mark.parametrize(
    "settings",
    [{"limit": 0}, {"num_fewshot": -1}, {"task_batch_size": 0}, {"tasks": (), "limit": 5}, {"tasks": (), "num_fewshot": 0}],
)
def test_settings_are_checked_and_need_tasks(settings):
    with pytest.raises(UsageError, match=f"--{list(settings)[-1]}"):
        TaskConfig(**{"tasks": ("boolq",)} | settings)


def test_chance_is_known_of_the_standard_tasks_and_counted_on_others():
    assert set(CHANCE) == set(STANDARD)
    config = TaskConfig(("x",))
    assert LoadedTask("boolq", (Little(),)).chance(config) == 0.5  # not counted
    assert LoadedTask("little", (Little(),)).chance(config) == pytest.approx((1 / 2 + 1 / 4 + 1 / 2) / 3)
    assert LoadedTask("little", (Little(),)).chance(TaskConfig(("x",), limit=1)) == 1 / 2
    writes = Little()
    writes.OUTPUT_TYPE = "generate_until"
    assert LoadedTask("little", (writes,)).chance(config) is None
    assert LoadedTask("group", (Little(), Little())).chance(config) is None
    assert guessing([2, 0]) is None and guessing([]) is None


def test_chance_is_unknown_where_several_answers_are_right_or_the_task_counts_in_a_way_of_its_own():
    several, own, older = Little(), Little(), Little()
    several.multiple_target = 2
    own.config.process_results = lambda doc, results: {"acc": 0.3}  # as truthfulqa_mc2
    del older.multiple_target  # a task that is a class of its own need not have it
    assert [LoadedTask("little", (task,)).chance(TaskConfig(("x",))) for task in (several, own, older)] == [None] * 3


def test_a_fingerprint_is_of_what_is_asked():
    def of(words: str = "query", **settings) -> str:
        return LoadedTask("little", (Little(words),)).fingerprint(TaskConfig(("x",), **settings))

    assert of() == of() != of("other")  # another object, another path: the same questions
    assert len({of(), of(limit=1), of(limit=2), of(num_fewshot=1)}) == 4
    assert of(task_batch_size=2) == of(limit=3) == of()


ANSWER = {
    "results": {
        "little": {
            "name": "little",
            "alias": " - little",
            "sample_len": 3,
            "acc,none": 0.75,
            "acc_stderr,none": 0.25,
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": "N/A",
            "exact_match,strict": 1,
        }
    },
    "versions": {"little": 1.5},
    "n-shot": {"little": 2},
    "higher_is_better": {"little": {"acc": True, "acc_norm": True}},
    "n-samples": {"little": {"original": 9, "effective": 3}},
}


def test_every_metric_is_a_figure_with_all_that_must_be_known_of_it():
    figures = figures_of(ANSWER, LoadedTask("little", (Little(),)), 0.4)
    assert [(f.metric, f.value, f.stderr) for f in figures] == [
        ("acc", 0.75, 0.25),
        ("acc_norm", 0.5, None),
        ("exact_match,strict", 1.0, None),
    ]
    facts = {"task": "little", "version": 1.5, "num_fewshot": 2, "samples": 3, "higher_is_better": True, "chance": 0.4}
    assert figures[0].facts == facts and figures[2].facts["chance"] is None


def test_a_group_gives_its_own_figures_or_those_of_its_tasks():
    group = LoadedTask("group", (Little(),))
    assert {
        f.facts["task"] for f in figures_of(ANSWER | {"results": ANSWER["results"] | {"group": {"alias": "g"}}}, group, None)
    } == {"little"}
    answer = ANSWER | {"results": ANSWER["results"] | {"group": {"acc,none": 0.1}}}
    assert [(f.facts["task"], f.value) for f in figures_of(answer, group, None)] == [("group", 0.1)]


def test_tables_show_the_metric_that_papers_report():
    assert shown_metric(["acc", "acc_norm"]) == "acc_norm" and shown_metric(["f1", "acc"]) == "acc"
    assert shown_metric(["word_perplexity", "byte_perplexity"]) == "word_perplexity"
