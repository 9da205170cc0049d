"""Any number of models by any number of measurements: the order of work, and what a results file spares the next run."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import half_pruned

from LLMPruner.config import CommonConfig, EfficiencyConfig, EvalConfig
from LLMPruner.errors import UsageError
from LLMPruner.evaluator import ppl
from LLMPruner.evaluator.compare import shared_windows
from LLMPruner.evaluator.efficiency import Efficiency
from LLMPruner.evaluator.ppl import measure
from LLMPruner.evaluator.tasks import TaskConfig
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import load_model, load_tokenizer, save_model
from LLMPruner.model.source import find_model
from LLMPruner.stages.evaluate import evaluate, overview_of, report
from LLMPruner.stages.evaluation_job import EvaluationJob, check, find_models
from LLMPruner.stages.subjects import subject_of

TWO = EvalConfig(("wikitext2", "ptb"), 32, 5)


@pytest.fixture(scope="module")
def pruned(trained_dir, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("evaluated") / "pytorch_model.bin"
    save_model(path, half_pruned(trained_dir))
    return path


@pytest.fixture
def common(data_dir) -> CommonConfig:
    return CommonConfig(dtype="float32", device="cpu", data_dir=str(data_dir))


@pytest.fixture
def job(trained_dir, pruned, common) -> EvaluationJob:
    """Four models on two corpora."""
    given = [f"half={pruned}", f"again={pruned}"]
    return EvaluationJob(find_models({"pruned": str(pruned), "original": str(trained_dir)}, given), ppl=TWO, common=common)


@pytest.fixture
def measured(monkeypatch) -> list[tuple[str, str]]:
    """The models and corpora that are measured, as they come."""
    seen = []

    def spy(runner, windows, label, *rest):
        seen.append((label, *windows))
        return measure(runner, windows, label, *rest)

    monkeypatch.setattr(ppl, "measure", spy)
    return seen


def test_models_are_measured_one_at_a_time_the_documents_roles_first(job, monkeypatch):
    seen, alive = [], []

    def spy(runner, windows, label, *rest):
        assert all(other() is None for other in alive if other() is not runner), "another model is still in memory"
        alive.append(weakref.ref(runner))
        runner.itself = [runner]  # so that it goes only where it is collected
        seen.append((label, *windows))
        return measure(runner, windows, label, *rest)

    monkeypatch.setattr(ppl, "measure", spy)
    gc.disable()  # what is freed is freed by the stage, not by chance
    try:
        evaluate(job)
    finally:
        gc.enable()
    assert seen == [(name, corpus) for name in ("original", "pruned", "half", "again") for corpus in TWO.datasets]


def test_the_file_holds_every_measurement_and_where_it_was_made(job, tmp_path):
    job = replace(job, results=tmp_path / "r.json", command="python evaluate_models.py --as given")
    evaluate(job)
    saved = json.loads((tmp_path / "r.json").read_text())
    assert list(saved["models"]) == ["original", "pruned", "half", "again"] and "efficiency" not in saved
    assert (saved["device"], saved["dtype"], saved["seq_len"], saved["samples"]) == ("cpu", "float32", 32, 5)
    assert saved["windows"] == {"wikitext2": 5, "ptb": 5}
    windows = shared_windows(job.sources, {"original": load_tokenizer(job.sources["original"])}, TWO, job.common.data_dir)
    for name, source in job.sources.items():
        row, model = saved["models"][name], load_model(source, dtype="float32", device="cpu").model
        assert row["path"] == str(source.path) and row["parameters"] == source.plan.total_params
        own = measure(LayerRunner.of(model), windows, name)
        assert row["ppl"] == {result.corpus: result.as_dict() for result in own}
        records = [record for record in saved["records"] if record["model"] == name]
        assert [(r["name"], r["metric"], r["value"]) for r in records] == [(o.corpus, "ppl", o.ppl) for o in own]
        assert all(r["settings"]["windows"] == 5 and len(r["settings"]["text"]) == 32 and r["run"] == 0 for r in records)
    (run,) = saved["provenance"]
    assert run["command"] == job.command and (run["seed"], run["device"], run["dtype"]) == (42, "cpu", "float32")
    assert run["versions"].keys() == {"LLMPruner", "python", "torch", "transformers"} and run["hardware"]


def test_what_was_killed_half_way_goes_on_with_what_is_missing(job, tmp_path, monkeypatch, measured):
    job = replace(job, results=tmp_path / "r.json", resume=True)  # there is no file yet
    opened, alone = [], ppl.measure

    def dies(runner, windows, label, *rest):
        if (label, *windows) == ("pruned", "ptb"):
            raise KeyboardInterrupt
        return alone(runner, windows, label, *rest)

    monkeypatch.setattr(ppl, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(job)
    saved = json.loads((tmp_path / "r.json").read_text())
    assert [(r["model"], r["name"]) for r in saved["records"]] == measured
    assert measured == [("original", "wikitext2"), ("original", "ptb"), ("pruned", "wikitext2")]
    del measured[:]
    monkeypatch.setattr(ppl, "measure", alone)
    monkeypatch.setattr("LLMPruner.model.load.load_model", lambda s, **kw: opened.append(s.path) or load_model(s, **kw))
    resumed = evaluate(replace(job, command="again"))
    assert measured == [("pruned", "ptb"), ("half", "wikitext2"), ("half", "ptb"), ("again", "wikitext2"), ("again", "ptb")]
    assert opened == [job.sources[name].path for name in ("pruned", "half", "again")]  # each once, the complete one never
    fresh = evaluate(replace(job, results=None, resume=False))
    assert report(resumed, "csv", "en") == report(fresh, "csv", "en")
    saved = json.loads((tmp_path / "r.json").read_text())
    assert [r["run"] for r in saved["records"]] == [0] * 3 + [1] * 5 and saved["provenance"][1]["command"] == "again"


CHANGES = {
    "nothing": lambda job: job,
    "another window length": lambda job: replace(job, ppl=replace(job.ppl, seq_len=16)),
    "a stride": lambda job: replace(job, ppl=replace(job.ppl, stride=8)),
    "more windows": lambda job: replace(job, ppl=replace(job.ppl, samples=6)),
    "raw text": lambda job: replace(job, common=replace(job.common, text_format="raw")),
    "another precision": lambda job: replace(job, common=replace(job.common, dtype="bfloat16")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_figure_is_taken_only_where_all_that_it_depends_on_is_the_same(job, tmp_path, measured, change):
    small = find_models({"original": str(job.sources["original"].path)}, [])
    job = replace(job, sources=small, ppl=replace(TWO, datasets=("ptb",)), results=tmp_path / "r.json", resume=True)
    first = evaluate(job).records
    assert len(measured) == 1
    second = evaluate(CHANGES[change](job))
    assert len(measured) == len(json.loads((tmp_path / "r.json").read_text())["records"]) == (1 if change == "nothing" else 2)
    assert len(second.records) == 1 and (second.records[0]["key"] == first[0]["key"]) == (change == "nothing")
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["models"]["original"]["ppl"]["ptb"]["ppl"] == second.records[0]["value"], "what is told is today's"
    (row,) = json.loads(report(second, "json", "en"))
    assert row["ppl ptb"] == second.records[0]["value"] and len(overview_of(second, "en").section("ppl")) == 1
    assert evaluate(job).records[0]["value"] == first[0]["value"]
    assert len(measured) == (1 if change == "nothing" else 2), "what was measured first is there still"


def test_a_model_that_was_written_anew_is_measured_anew(job, trained_dir, tmp_path, measured, tokenizer):
    model = load_model(job.sources["original"], dtype="float32", device="cpu").model
    folder = tmp_path / "model"
    job = replace(job, ppl=replace(TWO, datasets=("ptb",)), results=tmp_path / "r.json", resume=True)
    values = []
    for change in ("", "weights", "config", "time"):
        if change == "weights":
            model.model.layers[2].mlp.up_proj.weight.data *= 0.9
        if change in ("", "weights"):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        elif change == "config":
            config = json.loads((folder / "config.json").read_text())
            config["rope_parameters"]["rope_theta"] = 5e3
            (folder / "config.json").write_text(json.dumps(config))
        else:
            os.utime(folder / "model.safetensors", (1, 1))
        records = evaluate(replace(job, sources=find_models({}, [f"it={folder}"]))).records
        values.append(records[0]["value"])
    assert len(measured) == 4 and len(set(values[:3])) == 3 and values[3] == values[2]
    saved = json.loads((tmp_path / "r.json").read_text())
    assert len(saved["records"]) == 4 and saved["models"]["it"]["ppl"]["ptb"]["ppl"] == values[-1]
    assert evaluate(replace(job, sources=find_models({}, [f"it={folder}"]), resume=False)).records[0]["value"] == values[-1]
    assert len(json.loads((tmp_path / "r.json").read_text())["records"]) == 1, "without --resume the file is a new one"


def test_what_is_written_into_a_models_folder_is_no_part_of_it(trained_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(trained_dir, folder)

    def fingerprint() -> str:
        return subject_of("it", find_model(str(folder), "")).fingerprint

    first = fingerprint()
    for name in ("results.json", "notes.jinja", "tokenizer.model"):
        (folder / name).write_text("[]")
        assert fingerprint() == first
    (folder / "additional_chat_templates").mkdir()
    seen = {first}
    for name in ("chat_template.jinja", "additional_chat_templates/short.jinja", "generation_config.json", "tokenizer.json"):
        before = (folder / name).read_text() if (folder / name).exists() else ""
        (folder / name).write_text(before + "\n")
        seen.add(fingerprint())
    assert len(seen) == 5


def test_two_commands_on_one_file_lose_nothing_because_the_second_is_refused(job, tmp_path, monkeypatch):
    job = replace(job, sources={"original": job.sources["original"]}, ppl=replace(TWO, datasets=("ptb",)))
    job, other, refused = replace(job, results=tmp_path / "r.json"), replace(job, results=tmp_path / "s.json"), []

    def during(runner, windows, label, *rest):
        monkeypatch.setattr(ppl, "measure", measure)
        evaluate(other)
        with pytest.raises(UsageError, match=f"another run is at work in {job.results}: wait") as error:
            evaluate(replace(job, resume=True))
        refused.append(error)
        return measure(runner, windows, label, *rest)

    monkeypatch.setattr(ppl, "measure", during)
    evaluate(job)
    assert refused and len(json.loads(job.results.read_text())["records"]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "s.json"}


def test_without_resume_a_file_is_replaced_and_with_it_other_models_stay(job, tmp_path):
    path = tmp_path / "r.json"
    one = replace(job, sources={"half": job.sources["half"]}, results=path)
    evaluate(replace(one, sources={"original": job.sources["original"]}))
    evaluate(replace(one, resume=True))
    assert {r["model"] for r in json.loads(path.read_text())["records"]} == {"original", "half"}
    assert list(json.loads(path.read_text())["models"]) == ["half"]
    evaluate(one)
    assert {r["model"] for r in json.loads(path.read_text())["records"]} == {"half"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"models": {}}', '{"records": [{}], "provenance": []}', '{"records": 1}'])
def test_a_file_that_is_damaged_or_not_ours_is_refused_and_stays(job, tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="--resume"):
        check(replace(job, results=path, resume=True))
    assert path.read_text() == text


def test_a_broken_model_is_null_in_the_file_and_not_measured_again(job, tmp_path, measured, tokenizer):
    model = load_model(job.sources["original"], dtype="float32", device="cpu").model
    model.model.norm.weight.data[0] = math.nan
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    sources = find_models({"original": str(job.sources["original"].path)}, [f"broken={tmp_path / 'broken'}"])
    job = replace(job, sources=sources, ppl=replace(TWO, datasets=("ptb",)), results=tmp_path / "r.json", resume=True)
    tables = [report(evaluate(job), form, "en") for form in ("csv", "csv", "json")]
    assert tables[0] == tables[1] and len(measured) == 2
    assert json.loads(tables[2])[1]["ppl ptb"] is None


@pytest.fixture
def timed(monkeypatch) -> list[list[str]]:
    """The models whose speed is measured together, as they come; it takes 9 seconds."""
    calls, clock = [], iter(range(0, 900, 9))
    costs = Efficiency(1000, 4_000_000, 2_000_000, 64, 100.0, {1: 10.0, 8: 50.0}, 0.5, 9_000_000, 4000, 3000).as_dict()

    def measure_costs(sources, *_):
        calls.append(list(sources))
        return {name: costs | {"prefill_rate": 100.0 * place} for place, name in enumerate(sources, start=1)}

    monkeypatch.setattr("LLMPruner.stages.measurements.measure_costs", measure_costs)
    monkeypatch.setattr("LLMPruner.stages.evaluate.time.perf_counter", lambda: next(clock))
    return calls


def test_efficiency_is_measured_of_all_together_or_not_at_all(job, tmp_path, timed, capsys):
    job = replace(job, ppl=None, efficiency=EfficiencyConfig(8, 2, 1), results=tmp_path / "r.json", resume=True)
    job = replace(job, baseline="half")
    first, second = evaluate(job), evaluate(job)
    assert timed == [["half", "original", "pruned", "again"]], "the first one is what the others are compared to"
    assert first.view["efficiency"] == second.view["efficiency"] and list(first.view["efficiency"]) == list(job.sources)
    tables = capsys.readouterr().out.split("Efficiency on ")[1:]
    assert tables[0] == tables[1] and tables[0].startswith("cpu, float32, ") and "ratios to half\n" in tables[0]
    assert "bound of decode" in tables[0] and "(2.000x)" in tables[0] and "decode rates" not in report(second, "text", "en")
    assert {"parameters", "prefill_rate", "decode_rates.1"} <= {r["metric"] for r in first.records}
    assert {r["seconds"] for r in first.records} == {9 / 4}
    evaluate(replace(job, sources={name: job.sources[name] for name in ("original", "half")}))
    assert len(timed) == 2, "beside others it is another measurement"


@pytest.mark.parametrize("name", ["cpu_name", "platform.node", "torch.get_num_threads"])
def test_speeds_of_another_machine_are_measured_anew_and_nothing_else_is(job, tmp_path, timed, measured, monkeypatch, name):
    job = replace(job, sources={"original": job.sources["original"]}, results=tmp_path / "r.json", resume=True)
    job = replace(job, ppl=replace(TWO, datasets=("ptb",)), efficiency=EfficiencyConfig(8, 2, 1))
    evaluate(job)
    monkeypatch.setattr(f"LLMPruner.stages.subjects.{name}" if name != "torch.get_num_threads" else name, lambda: "elsewhere")
    evaluate(job)
    assert (len(measured), len(timed)) == (1, 2)
    told = json.dumps(json.loads((tmp_path / "r.json").read_text())["provenance"])
    assert ("elsewhere" in told) == (name != "platform.node")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["nothing"], "NAME=PATH"),
        (["=path"], "NAME=PATH"),
        (["name="], "NAME=PATH"),
        ([" name=path"], "NAME=PATH"),
        (["a={model}", "a={model}"], "two models are named a"),
        (["original={model}", "original={model}"], "two models are named original"),
        (["a=nothere.bin"], "--models a nothere.bin does not exist"),
        ([], "--models NAME=PATH"),
    ],
)
def test_names_are_names_and_each_is_given_once(trained_dir, given, words):
    with pytest.raises(UsageError, match=words):
        find_models({}, [text.format(model=trained_dir) for text in given])


def test_a_path_may_have_an_equals_sign(trained_dir, tmp_path):
    (tmp_path / "a=b").symlink_to(trained_dir)
    assert find_models({}, [f"x={tmp_path}/a=b"])["x"].path == tmp_path / "a=b"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ppl": None}, "nothing to measure"),
        ({"resume": True}, "--resume needs --save_results"),
        ({"baseline": "nobody"}, "--baseline nobody is none of the models: original, pruned, half, again"),
        ({"ppl": replace(TWO, stride=0)}, "--stride must lie between 1 and --seq_len 32"),
        ({"ppl": replace(TWO, stride=33)}, "--stride"),
        ({"efficiency": EfficiencyConfig(), "common": CommonConfig(stream="on")}, "--efficiency measures models in memory"),
        ({"tasks": TaskConfig(("boolq",)), "common": CommonConfig(stream="on")}, "--tasks measures models in memory"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_sentence(job, change, words):
    with pytest.raises(UsageError, match=words):
        check(replace(job, **change))


def test_tasks_are_for_one_process(job, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="--tasks measures one process"):
        check(replace(job, tasks=TaskConfig(("boolq",))))
