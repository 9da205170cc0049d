"""Tasks of lm-evaluation-harness: what is refused before a model is loaded, and what its answer becomes.

That its figures are those of its own command line is proved where it is installed: tests/consumers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from LLMPruner.errors import UsageError
from LLMPruner.evaluator import task_index, tasks
from LLMPruner.evaluator.tasks import (
    CHANCE,
    STANDARD,
    LoadedTask,
    TaskConfig,
    check_tasks,
    figures_of,
    guessing,
    load_tasks,
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
    monkeypatch.setattr(
        task_index, "manager", lambda defaults: SimpleNamespace(all_tasks=["boolq", "piqa"] if defaults else [])
    )
    monkeypatch.setattr(task_index, "version", lambda: "0.4")


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


@dataclass
class Group:
    """A group as lm_eval loads one."""

    name: str
    aggregate_metric_list: list = field(default_factory=list)
    child_names: list = field(default_factory=list)


@pytest.fixture
def loading(monkeypatch):
    """As if lm_eval were there, with a group `mine` of two tasks and another group; what it is asked for, and its index."""
    seen = []

    def manager(defaults: bool, folder: str | None = None):
        def load(names: list[str]) -> dict:
            seen.append(
                (Path(names[0]).name, defaults, [path.read_text() for path in Path(folder or "/nowhere").glob("*.yaml")])
            )
            leaves = ("one", "two") if names == ["mine"] else ("alone",)
            groups = {"mine": Group("mine"), "below": Group("below")} if names == ["mine"] else {}
            return {"tasks": {n: SimpleNamespace(task_name=n, has_test_docs=lambda: True) for n in leaves}, "groups": groups}

        return SimpleNamespace(load=load, all_tasks=["boolq"])

    monkeypatch.setattr(task_index, "manager", manager)
    return seen


def test_a_group_given_as_a_file_is_called_by_its_own_name_wherever_it_lies(loading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("g.yaml").write_text("# mine\n'group': mine\ntask: [boolq, !function utils.x]\n")
    for given in ("g.yaml", "./g.yaml", str(tmp_path / "g.yaml")):
        (group,) = load_tasks(TaskConfig((given,)))
        assert group.name == "mine" and list(group.groups) == ["mine", "below"] and len(group.leaves) == 2
    answer = ANSWER | {"results": {"mine": {"acc,none": 0.1}, "one": {"acc,none": 0.2}}}
    assert [(f.facts["task"], f.value) for f in figures_of(answer, group, None)] == [("mine", 0.1)]
    with pytest.raises(UsageError, match="--tasks names mine twice"):
        load_tasks(TaskConfig(("g.yaml", "./g.yaml")))


def test_a_group_given_as_a_file_may_list_built_in_tasks_and_a_task_needs_no_index_of_them(loading, tmp_path):
    group = "group: mine\ntask: [boolq]\n"
    for name, text in (("g.yaml", group), ("alone.yaml", "task: alone\nmetadata:\n  group: x\n")):
        (tmp_path / name).write_text(text)
        load_tasks(TaskConfig((str(tmp_path / name),)))
    assert loading == [("mine", True, [group]), ("alone.yaml", False, [])]


@pytest.mark.parametrize("content", [b"task: [", b"\xff"])
def test_what_is_no_yaml_is_refused(loading, tmp_path, content):
    (tmp_path / "g.yaml").write_bytes(content)
    with pytest.raises(UsageError, match="--tasks .*g.yaml is no YAML"):
        load_tasks(TaskConfig((str(tmp_path / "g.yaml"),)))


def test_how_a_group_puts_its_tasks_together_is_part_of_its_fingerprint():
    def of(**changes) -> str:
        groups = {"mine": Group("mine", **changes)}
        return LoadedTask("mine", (Little(),), groups).fingerprint(TaskConfig(("x",)))

    mean = {"metric": "acc", "weight_by_size": True}
    assert len({of(), of(aggregate_metric_list=[mean]), of(aggregate_metric_list=[mean | {"weight_by_size": False}])}) == 3
    assert of() == of() != of(child_names=["little"])


def test_tables_show_the_metric_that_papers_report():
    assert shown_metric(["acc", "acc_norm"]) == "acc_norm" and shown_metric(["f1", "acc"]) == "acc"
    assert shown_metric(["word_perplexity", "byte_perplexity"]) == "word_perplexity"
