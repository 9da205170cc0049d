"""A job: what it does follows from its settings, and all that can be wrong is said before a weight is read."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import half_pruned

from LLMPruner.config import EXPORT_FORMATS, CommonConfig, EvalConfig, ExportConfig, PruneConfig
from LLMPruner.errors import UsageError
from LLMPruner.importance.budget import make_budget
from LLMPruner.importance.layer_analyzer import LayerImportance
from LLMPruner.importance.search.state import SearchState
from LLMPruner.model.load import save_model
from LLMPruner.model.size import checkpoint_bytes
from LLMPruner.model.source import find_model
from LLMPruner.stages.job import (
    FINETUNED_FILE,
    MODEL_FILE,
    SEARCH_FILE,
    PruneJob,
    RecoverJob,
    check_export_places,
    check_exports,
    check_prune,
    check_recover,
    search_key,
)
from LLMPruner.stages.journal import Journal, prune_key
from LLMPruner.training_config import FinetuneConfig

PRUNE = PruneConfig(prune_mlp=True, calibration_seq_len=64, layer_importance_seq_len=32)
SEARCH = replace(PRUNE, pruning_strategy="search", distill_model_epochs=1)  # without which the last layers are no setting
BLIND = replace(PRUNE, importance="magnitude", pruning_strategy="global", repair="none")  # reads no text
FINETUNE = FinetuneConfig(seq_len=64, prefix="--finetune_")


@pytest.fixture
def source(trained_dir):
    return find_model(str(trained_dir), "--base_model")


@pytest.fixture
def job(source, data_dir, tmp_path, monkeypatch) -> PruneJob:
    """A job in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    return PruneJob(source, PRUNE, CommonConfig(dtype="float32", device="cpu", data_dir=str(data_dir)), EvalConfig(seq_len=64))


@pytest.fixture
def recovery(job, trained_dir) -> RecoverJob:
    """A recovery of a pruned `m.bin`."""
    save_model(Path("m.bin"), half_pruned(trained_dir))
    return RecoverJob(find_model("m.bin", "--model_path"), FinetuneConfig(seq_len=64), job.evaluation, job.common)


def found() -> dict[str, bytes | None]:
    """All that lies in the working folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def refused(check, job, folder: Path, words: str) -> None:
    before = found()
    with pytest.raises(UsageError) as error:
        check(job, folder)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert found() == before, "something changed on disk"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"analyzes", "calibrates"}),
        ({"prune": BLIND}, set()),
        ({"prune": replace(BLIND, freeze_top_n_layers=1)}, {"analyzes"}),
        ({"prune": replace(PRUNE, layer_importance_file="scores.json")}, {"calibrates"}),
        ({"prune": SEARCH}, {"calibrates"}),
        ({"prune": replace(BLIND, pruning_strategy="search")}, {"calibrates"}),
        ({"prune": replace(BLIND, repair="bias")}, {"calibrates"}),
        ({"prune": replace(BLIND, importance="wanda")}, {"calibrates"}),
        ({"prune": replace(BLIND, self_samples=4, distill_epochs=1)}, set()),
        ({"prune": replace(BLIND, repair="bias", self_samples=4, distill_epochs=1)}, {"calibrates", "writes", "distills"}),
        ({"prune": BLIND, "test_original": True}, {"measures"}),
        ({"prune": BLIND, "test_pruned": True}, {"measures"}),
        ({"prune": BLIND, "finetune": FINETUNE}, {"measures", "saves_finetuned"}),
        ({"prune": BLIND, "finetune": FINETUNE, "save": False}, {"measures"}),
        ({"prune": BLIND, "finetune": FINETUNE, "test_pruned": True, "dry_run": True}, {"measures", "saves_finetuned"}),
    ],
)
def test_what_a_job_does_follows_from_its_settings(job, changes, expected):
    asked = replace(job, **changes)
    names = ("measures", "analyzes", "calibrates", "writes", "distills", "saves_finetuned")
    assert {name for name in names if getattr(asked, name)} == expected


def test_windows_are_cut_for_the_stages_that_read_them_and_no_other(job, tokenizer):
    everything = replace(job, prune=replace(SEARCH, freeze_top_n_layers=1, search_tokens=320), finetune=FINETUNE)
    windows = everything.windows(tokenizer)
    assert windows.layers.shape == (50, 32) and windows.calibration.shape == (32, 64)
    assert windows.repair.shape == (64, 64), "twice as many"
    assert windows.held_out.shape == (3, 64)
    assert list(windows.evaluation) == ["wikitext2"] and windows.evaluation["wikitext2"].shape[1] == 64
    blind = replace(job, prune=BLIND).windows(tokenizer)
    assert not [rows for rows in blind.all() if rows is not None]


def test_a_job_that_can_run_gets_its_budget_and_changes_nothing(job):
    folder = Path("prune_log/exp")
    assert check_prune(job, folder) == (make_budget(job.source.geometry, job.prune), None)
    assert found() == {}


def test_scores_of_this_model_come_back_and_those_of_another_are_refused(job):
    scores = LayerImportance((1.0, 2.0, 3.0, 4.0), "removal", 5, 32, "ptb", "train", 0, job.source.fingerprint())
    scores.save(Path("scores.json"))
    asked = replace(job, prune=replace(PRUNE, layer_importance_file="scores.json"))
    assert check_prune(asked, Path("exp"))[1] == scores
    replace(scores, fingerprint="another").save(Path("scores.json"))
    refused(check_prune, asked, Path("exp"), "made for another model")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prune": replace(PRUNE, calibration_seq_len=257)}, "--calibration_seq_len 257 is longer than the model's 256"),
        ({"prune": replace(PRUNE, layer_importance_seq_len=257)}, "--layer_importance_seq_len 257"),
        ({"evaluation": EvalConfig(seq_len=257), "test_pruned": True}, "--eval_seq_len 257"),
        ({"finetune": replace(FINETUNE, seq_len=257)}, "--finetune_seq_len 257"),
        ({"prune": replace(PRUNE, pruning_ratio=0.99)}, "largest feasible ratio"),
        ({"prune": replace(PRUNE, calibration_dataset="nothere")}, "unknown corpus"),
        ({"evaluation": EvalConfig(("nothere",), 64), "test_original": True}, "unknown corpus"),
        ({"finetune": replace(FINETUNE, dataset=("nothere",))}, "unknown corpus"),
        ({"prune": SEARCH, "resume": True}, "--resume"),
        ({"prune": replace(PRUNE, layer_importance_file="none.json")}, "does not exist"),
    ],
)
def test_a_prune_job_that_cannot_run_is_refused_with_nothing_changed(job, changes, words):
    refused(check_prune, replace(job, **changes), Path("exp"), words)


def test_what_a_job_does_not_read_is_not_asked_for(job):
    asked = replace(job, prune=replace(BLIND, calibration_dataset="nothere"), evaluation=EvalConfig(("nothere",), 64))
    check_prune(asked, Path("exp"))
    refused(check_prune, replace(asked, test_pruned=True), Path("exp"), "unknown corpus")


def test_a_pruned_model_is_not_pruned_again(job, recovery):
    refused(check_prune, replace(job, source=recovery.source), Path("exp"), "m.bin is pruned already")


@pytest.mark.parametrize("name", [MODEL_FILE, FINETUNED_FILE])
def test_neither_job_overwrites_the_model_that_it_reads(job, recovery, trained_dir, name):
    Path("exp").mkdir()
    dense = half_pruned(trained_dir)
    save_model(Path("exp", name), dense)
    read = find_model(str(Path("exp", name)), "--model_path")
    if name == FINETUNED_FILE:
        refused(check_recover, replace(recovery, source=read), Path("exp"), f"--save_name exp would overwrite exp/{name}")
        check_recover(replace(recovery, source=read, save=False), Path("exp"))
    else:
        check_recover(replace(recovery, source=read), Path("exp"))  # which writes another file
    whole = replace(job.source, path=read.path)
    refused(check_prune, replace(job, source=whole), Path("exp"), f"--save_ckpt_log_name exp would overwrite exp/{name}")
    check_prune(replace(job, source=whole, dry_run=True), Path("exp"))


def test_a_checkpoint_is_not_left_beside_a_plan_that_it_does_not_follow(job):
    Path("exp").mkdir()
    Path("exp", MODEL_FILE).write_text("an earlier run's")
    refused(check_prune, replace(job, save=False), Path("exp"), "no longer fit the plan beside it")
    check_prune(job, Path("exp"))
    check_prune(replace(job, save=False, dry_run=True), Path("exp"))


def test_a_state_of_other_settings_is_refused(job):
    asked = replace(job, prune=SEARCH, resume=True)
    Path("exp").mkdir()
    SearchState().save(Path("exp", SEARCH_FILE), search_key(asked.sized()))
    check_prune(asked, Path("exp"))
    refused(check_prune, replace(asked, common=replace(job.common, seed=7)), Path("exp"), "other settings")


# Another value of every setting, and whether a search with it is the same one.
OTHERS = {
    "pruning_ratio": (0.3, False),
    "prune_attention": (False, False),
    "prune_mlp": (False, False),
    "ratio_base": ("selected", False),
    "round_to": (8, False),
    "layer_start": (1, False),
    "layer_end": (3, False),
    "layer_importance_method": ("activation", False),
    "layer_importance_samples": (7, False),
    "layer_importance_seq_len": (16, False),
    "pruning_strategy": ("uniform", False),
    "layer_importance_weight": (0.5, False),
    "min_pruning_rate": (0.1, False),
    "max_pruning_rate": (0.7, False),
    "freeze_top_n_layers": (1, False),
    "layer_importance_file": ("scores.json", True),
    "search_generations": (9, True),
    "search_tokens": (64, False),
    "search_minutes": (3.0, True),
    "allow_sublayer_removal": (True, False),
    "importance": ("obs", False),
    "repair": ("bias", False),
    "channel_importance_samples": (5, False),
    "repair_samples": (5, True),
    "self_samples": (5, True),
    "distill_epochs": (5, True),
    "distill_model_epochs": (5, True),
    "distill_labels": (0.25, True),
    "distill_last": (3, True),
    "calibration_seq_len": (32, False),
    "calibration_dataset": ("ptb", False),
    "calibration_bos": ("off", False),
}


def test_a_search_is_the_same_where_only_its_length_or_what_comes_after_it_changes(job):
    assert OTHERS.keys() == {entry.name for entry in fields(PruneConfig)}, "a new setting: does a search depend on it?"
    asked = replace(job, prune=SEARCH)
    for name, (value, same) in OTHERS.items():
        assert getattr(SEARCH, name) != value
        other = replace(SEARCH, **{name: value, "prune_mlp": name != "prune_mlp"})
        assert (search_key(replace(job, prune=other)) == search_key(asked)) == same, name
    for changes in ({"seed": 1}, {"dtype": "bfloat16"}, {"device": "auto"}, {"data_dir": None}):
        assert search_key(replace(asked, common=replace(job.common, **changes))) != search_key(asked)
    assert search_key(replace(asked, test_pruned=True, save=False, finetune=FINETUNE)) == search_key(asked)


@pytest.mark.parametrize(("device", "tokens", "generations"), [("cpu", 6144, 1), ("cuda", 24576, 2)])
def test_a_search_measures_as_much_as_the_device_affords_unless_told(job, monkeypatch, device, tokens, generations):
    monkeypatch.setattr("LLMPruner.stages.job.resolve_device", lambda _: torch.device(device))
    asked, told = replace(job, prune=SEARCH), replace(job, prune=replace(SEARCH, search_tokens=64, search_generations=3))
    sizes = {"search_tokens": tokens, "search_generations": generations}
    assert asked.sized() == replace(job, prune=replace(SEARCH, **sizes)) and told.sized() == told
    assert search_key(asked.sized()) == search_key(asked.sized().sized()) != search_key(told.sized())


def test_a_search_belongs_to_its_model(job, recovery):
    assert search_key(replace(job, prune=SEARCH, source=recovery.source)) != search_key(replace(job, prune=SEARCH))


def free(monkeypatch, size: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": size})())


@pytest.mark.parametrize("changes", [{}, {"finetune": FINETUNE}, {"export": ExportConfig(("hf",))}, {"save": False}])
def test_the_disk_must_hold_every_checkpoint_and_export(job, monkeypatch, changes):
    asked = replace(job, **changes)
    files = 1 + {"save": 0, "finetune": 2, "export": 2}.get(next(iter(changes), ""), 1)  # the finished layers, and these
    size = files * checkpoint_bytes(job.source.geometry.dense_params, "float32", "cpu")  # before pruning: an upper estimate
    free(monkeypatch, size)
    check_prune(asked, Path("exp"))
    if files:
        free(monkeypatch, size // files * (files - 1) + 1)
        refused(check_prune, asked, Path("exp"), "free")
        check_prune(replace(asked, dry_run=True), Path("exp"))


def test_what_a_dead_run_has_written_needs_no_room_again(job, monkeypatch):
    model, asked = checkpoint_bytes(job.source.geometry.dense_params, "float32", "cpu"), replace(job, resume=True)
    journal = Journal(Path("exp"), prune_key(job.sized()))
    journal.work.mkdir(parents=True)
    journal.record("save", [model - 1, 0])
    (journal.work / "layer_000.safetensors").write_bytes(b"1")
    free(monkeypatch, model)
    refused(check_prune, job, Path("exp"), "free")
    check_prune(asked, Path("exp"))
    journal.record("finished")
    free(monkeypatch, 0)
    check_prune(asked, Path("exp"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": FinetuneConfig(seq_len=257)}, "--seq_len 257 is longer than the model's 256"),
        ({"training": FinetuneConfig(seq_len=64, dataset=("nothere",))}, "unknown corpus"),
        ({"evaluation": EvalConfig(("nothere",), 64), "test_after": True}, "unknown corpus"),
        ({"evaluation": EvalConfig(("nothere",), 64), "test_before": True}, "unknown corpus"),
    ],
)
def test_a_recovery_that_cannot_run_is_refused_with_nothing_changed(recovery, changes, words):
    refused(check_recover, replace(recovery, **changes), Path("exp"), words)


def test_a_recovery_that_can_run_changes_nothing(recovery, monkeypatch):
    before = found()
    check_recover(replace(recovery, evaluation=EvalConfig(("nothere",), 64)), Path("exp"))  # and measures nothing
    assert found() == before
    size = checkpoint_bytes(recovery.source.plan.total_params, "float32", "cpu")
    free(monkeypatch, size)
    check_recover(recovery, Path("exp"))
    refused(check_recover, replace(recovery, export=ExportConfig(("padded",))), Path("exp"), "free")
    free(monkeypatch, size - 1)
    refused(check_recover, recovery, Path("exp"), "free")
    check_recover(replace(recovery, save=False), Path("exp"))


@pytest.mark.parametrize("form", EXPORT_FORMATS)
def test_an_export_replaces_an_older_one_and_nothing_else(tmp_path, form):
    place, wanted = tmp_path / EXPORT_FORMATS[form], ExportConfig((form,))
    check_export_places(wanted, tmp_path, Path("elsewhere"))
    if form == "gguf":
        place.write_bytes(b"GGUF and so on")
    else:
        place.mkdir()
        check_export_places(wanted, tmp_path, Path(__file__))  # an empty folder is nobody's work
        (place / "provenance.json").write_text("{}")
    check_export_places(wanted, tmp_path, Path(__file__))
    with pytest.raises(UsageError, match="would replace the model that is read"):
        check_export_places(wanted, tmp_path, place)
    check_export_places(ExportConfig(), tmp_path, place)
    if form == "gguf":
        place.write_text("notes")
    else:
        (place / "provenance.json").rename(place / "thesis.txt")
    with pytest.raises(UsageError, match="something else than an export"):
        check_export_places(wanted, tmp_path, Path(__file__))
    place.rename(tmp_path / "mine")
    place.symlink_to(tmp_path / "mine")
    with pytest.raises(UsageError, match="is a link"):
        check_export_places(wanted, tmp_path, Path(__file__))


def test_an_export_that_cannot_be_written_is_refused_before_weights_are_read(source, tokenizer, monkeypatch):
    def refuse(_):
        raise UsageError("it cannot be named")

    monkeypatch.setattr("LLMPruner.export.gguf.pre_tokenizer_name", refuse)
    check_exports(source, tokenizer, ExportConfig())
    check_exports(source, tokenizer, ExportConfig(("hf",)))
    with pytest.raises(UsageError, match="cannot be named"):
        check_exports(source, tokenizer, ExportConfig(("hf", "gguf")))
