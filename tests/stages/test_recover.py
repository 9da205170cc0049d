"""The stages of recovery: the train split alone, the same weights as the stages called by hand, and their record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import half_pruned, random_windows, tiny_model

from LLMPruner.config import CommonConfig, EvalConfig, ExportConfig
from LLMPruner.data.training import training_text
from LLMPruner.data.windows import evaluation_windows
from LLMPruner.errors import UsageError
from LLMPruner.evaluator.ppl import measure
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import LoadedModel, load_model, save_model
from LLMPruner.model.source import find_model
from LLMPruner.run import Run
from LLMPruner.stages.job import RecoverJob
from LLMPruner.stages.journal import Journal
from LLMPruner.stages.recover import recover, train_and_save
from LLMPruner.trainer.finetuner import finetune
from LLMPruner.training_config import FinetuneConfig, LoraConfig

SHORT = FinetuneConfig(lr=1e-2, samples=8, epochs=1, seq_len=32, batch_size=4, grad_accum=1, lora=LoraConfig(dropout=0.0))


@pytest.fixture
def pruned(trained_dir, tmp_path, monkeypatch) -> LoadedModel:
    """A pruned model, in a working folder of its own that has it as `m.bin`."""
    monkeypatch.chdir(tmp_path)
    loaded = half_pruned(trained_dir)
    save_model(Path("m.bin"), loaded)
    return loaded


@pytest.fixture
def common(data_dir) -> CommonConfig:
    return CommonConfig(seed=5, dtype="float32", device="cpu", data_dir=str(data_dir))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_windows(2, 16)).logits


def run_of(job: RecoverJob, name: str = "exp") -> tuple[LoadedModel, Run]:
    with Run(Path("prune_log", name), "script.py", ["--flag"], seed=job.common.seed, device="cpu") as run:
        return recover(job, run), run


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_recovery_is_its_stages_called_by_hand(pruned, common, method):
    config, evaluation = replace(SHORT, method=method), EvalConfig(("ptb",), 32, 4)
    source = find_model("m.bin", "--model_path")
    job = RecoverJob(source, config, evaluation, common, test_before=True, test_after=True)
    tuned, run = run_of(job)
    windows, tested = (
        training_text(pruned.tokenizer, config, common),
        evaluation_windows(pruned.tokenizer, evaluation, common.data_dir),
    )
    before = measure(LayerRunner.of(pruned.model), tested, "before")
    record = finetune(pruned, config, windows, seed=common.seed)
    after = measure(LayerRunner.of(pruned.model), tested, "after")
    assert logits(tuned.model).equal(logits(pruned.model)) and tuned.plan == source.plan
    saved = json.loads(Path("prune_log/exp/metrics.json").read_text())
    assert saved["ppl"] == {"before": [before[0].as_dict()], "after": [after[0].as_dict()]}
    assert saved["training"]["loss_last"] == record["loss_last"] and record.items() <= run.metrics["training"].items()


def test_only_what_was_asked_for_is_measured_saved_and_exported(pruned, common):
    job = RecoverJob(find_model("m.bin", "--model_path"), SHORT, EvalConfig(("nothere",), 32), common, save=False)
    _, run = run_of(job)
    assert {path.name for path in Path("prune_log/exp").iterdir()} == {
        "description.txt",
        "journal_finetune.json",
        "metrics.json",
        "training.png",
        run.timestamp_dir.name,
    }
    assert [stage["stage"] for stage in run.stages] == ["load", "train"] and run.metrics["ppl"] == {}
    tuned, run = run_of(replace(job, save=True, export=ExportConfig(("hf",))), "more")
    assert [stage["stage"] for stage in run.stages] == ["load", "train", "save", "export"]
    exported = load_model(find_model("prune_log/more/hf", "--model_path"), dtype="float32", device="cpu")
    assert logits(exported.model).equal(logits(tuned.model))
    stages = json.loads(Path("prune_log/more/metrics.json").read_text())["stages"]
    assert stages[-1]["stage"] == "export", "the last stage is on record too"


def test_in_the_folder_of_its_pruning_it_writes_records_of_its_own(pruned, common):
    folder = Path("prune_log/exp")
    folder.mkdir(parents=True)
    save_model(folder / "pytorch_model.bin", pruned)
    for name in ("metrics.json", "description.txt"):
        (folder / name).write_text("of the pruning")
    run_of(RecoverJob(find_model(str(folder / "pytorch_model.bin"), "--model_path"), SHORT, EvalConfig(), common))
    assert {(folder / name).read_text() for name in ("metrics.json", "description.txt")} == {"of the pruning"}
    assert json.loads((folder / "metrics_finetune.json").read_text())["training"]["steps"] == 2
    assert "seq_len: 32" in (folder / "description_finetune.txt").read_text()


def test_a_model_that_does_not_embed_the_text_is_refused_before_weights_are_read(common, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(vocab_size=100).save_pretrained("small")
    tokenizer.save_pretrained("small")
    monkeypatch.setattr("LLMPruner.stages.recover.load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match="--model_path embeds 100 tokens"):
        run_of(RecoverJob(find_model("small", "--model_path"), SHORT, EvalConfig(), common))
    assert not Path("prune_log").exists()


def test_training_reads_the_train_split_and_no_other(tokenizer, data_dir, tmp_path):
    (tmp_path / "wikitext-2-raw").mkdir()
    train = (data_dir / "wikitext-2-raw" / "train.txt").read_text()
    (tmp_path / "wikitext-2-raw" / "train.txt").write_text(train)
    config = replace(SHORT, samples=48)
    cut = training_text(tokenizer, config, CommonConfig(seed=1, data_dir=str(tmp_path))).rows.windows
    text = "\n\n".join(train.strip().split("\n"))
    assert cut.shape == (48, 32) and cut.dtype == torch.int64
    assert all(tokenizer.decode(row).strip() in text for row in cut)
    other = training_text(tokenizer, config, CommonConfig(seed=2, data_dir=str(tmp_path)))
    assert not cut.equal(other.rows.windows)


def test_train_and_save_writes_the_model_and_how_it_came_about(pruned, common):
    text = training_text(pruned.tokenizer, SHORT, common)
    with Run(Path("prune_log/exp"), "script.py", ["--flag"], seed=5) as run:
        base, journal = run.dir / "pytorch_model.bin", Journal(run.dir, {})
        record = train_and_save(pruned, SHORT, text, run, journal, seed=5, save=True, base=base)
    source = find_model("prune_log/exp/pytorch_model_finetuned.bin", "--model_path")
    loaded = load_model(source, dtype="float32", device="cpu")
    assert logits(loaded.model).equal(logits(pruned.model)) and loaded.plan == pruned.plan
    finetuning = loaded.provenance["finetune"]
    expected = {
        "method": "lora",
        "lr": 1e-2,
        "samples": 8,
        "windows": 8,
        "epochs": 1,
        "seq_len": 32,
        "corpus": "wikitext2",
        "parts": {"wikitext2": 1.0},
        "split": "train",
        "seed": 5,
        "base_checkpoint": "prune_log/exp/pytorch_model.bin",
    }
    assert expected.items() <= finetuning.items() and finetuning["lora"]["r"] == 8
    assert finetuning["versions"].keys() >= {"torch", "transformers", "peft"}
    assert {"train", "save"} == {stage["stage"] for stage in run.stages} and json.dumps(record)
    assert Path("prune_log/exp/adapter/adapter_config.json").is_file()


def test_train_and_save_without_save_writes_no_model(pruned, common):
    text = training_text(pruned.tokenizer, SHORT, replace(common, seed=0))
    with Run(Path("prune_log/exp"), "script.py", [], seed=0) as run:
        train_and_save(pruned, SHORT, text, run, Journal(run.dir, {}), seed=0, save=False, base=Path("dense"))
    assert {path.name for path in Path("prune_log/exp").iterdir()} == {run.timestamp_dir.name, "work", "training.png"}
