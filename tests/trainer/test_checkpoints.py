"""A training that dies goes on as if it had not, and the state that is kept is the one with the least held-out loss."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import half_pruned, plain_text
from transformers import TrainerCallback

from LLMPruner.data.windows import load_windows
from LLMPruner.errors import RunError
from LLMPruner.model.load import load_model
from LLMPruner.model.source import find_model
from LLMPruner.trainer import checkpoints, finetuner
from LLMPruner.trainer.checkpoints import WHOLE, last_checkpoint
from LLMPruner.trainer.finetuner import Places, finetune
from LLMPruner.trainer.teacher import DrawnAnswers, draw_answers
from LLMPruner.training_config import DistillConfig, FinetuneConfig, LoraConfig

LORA = FinetuneConfig(lr=5e-3, samples=24, epochs=3, seq_len=32, batch_size=2, grad_accum=2, lora=LoraConfig(dropout=0.3))
STEPS = 18


@pytest.fixture
def text(tokenizer, data_dir):
    def rows(split, samples):
        return load_windows(tokenizer, "wikitext2", split, seq_len=32, samples=samples, data_dir=str(data_dir), seed=0)

    return plain_text(rows("train", 24), {"wikitext2": rows("validation", 6)})


def train(trained_dir, text, folder, config=LORA, **more):
    loaded = half_pruned(trained_dir)
    record = finetune(loaded, config, text, seed=3, places=Places(folder), **more)
    return record, {name: value.clone() for name, value in loaded.model.state_dict().items()}


class Dies(TrainerCallback):
    """Ends the process at a step: before the checkpoint is marked, or at the end of a step."""

    def __init__(self, step, where):
        self.step, self.where = step, where

    def on_step_end(self, args, state, control, **kwargs):
        if self.where == "step" and state.global_step == self.step:
            raise KeyboardInterrupt

    def on_save(self, args, state, control, **kwargs):
        if self.where == "save" and state.global_step >= self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("step", "where"), [(1, "step"), (11, "step"), (STEPS, "step"), (7, "save")])
def test_a_training_that_died_ends_as_one_that_did_not(trained_dir, text, tmp_path, monkeypatch, method, step, where):
    config = replace(LORA, method=method, check_steps=4, lr=5e-3 if method == "lora" else 1e-3)
    record, weights = train(trained_dir, text, tmp_path / "whole", config)
    report = finetuner._report

    def dies(trainer, *args):
        trainer.add_callback(Dies(step, where))  # before the one that marks a checkpoint as whole
        report(trainer, *args)

    monkeypatch.setattr(finetuner, "_report", dies)
    with pytest.raises(KeyboardInterrupt):
        train(trained_dir, text, tmp_path / "dead", config)
    monkeypatch.setattr(finetuner, "_report", report)
    again, resumed = train(trained_dir, text, tmp_path / "dead", config)
    assert again["curve"] == record["curve"] and again["held_out"] == record["held_out"]
    done = (step - 1) // 4 * 4  # the last whole checkpoint
    assert again | {"resumed_at": None} == record and again["resumed_at"] == (done or None)
    assert all(value.equal(resumed[name]) for name, value in weights.items())


def test_two_checkpoints_are_kept_and_a_torn_one_does_not_count(trained_dir, text, tmp_path):
    train(trained_dir, text, tmp_path, replace(LORA, check_steps=3))
    folders = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert len(folders) == 2 and f"checkpoint-{STEPS}" in folders
    shutil.copytree(tmp_path / f"checkpoint-{STEPS}", tmp_path / "checkpoint-99")
    (tmp_path / "checkpoint-99" / WHOLE).unlink()
    assert last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{STEPS}" and not (tmp_path / "checkpoint-99").exists()


@pytest.mark.parametrize(("best", "left"), [(1, [1, 4]), (4, [3, 4]), (None, [3, 4])])
def test_a_death_while_old_checkpoints_go_leaves_the_best_and_the_last(tmp_path, monkeypatch, best, left):
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / WHOLE).touch()
    path = None if best is None else str(tmp_path / f"checkpoint-{best}")

    def dies(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints.shutil, "rmtree", dies)
        checkpoints._remove_old(tmp_path, path)
    torn = [folder for folder in tmp_path.iterdir() if not (folder / WHOLE).exists()]
    assert len(torn) == 1 and torn[0].name not in {f"checkpoint-{step}" for step in left}
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4" and not torn[0].exists()
    checkpoints._remove_old(tmp_path, path)
    assert sorted(int(folder.name[-1]) for folder in tmp_path.iterdir()) == left


def test_the_checkpoint_of_another_model_is_refused(trained_dir, text, tmp_path):
    train(trained_dir, text, tmp_path)
    with pytest.raises(RunError, match="checkpoint of another model"):
        train(trained_dir, text, tmp_path, replace(LORA, lora=LoraConfig(r=3)))


def test_looks_at_held_out_text_take_no_more_than_a_fifth_of_a_training():
    config = FinetuneConfig(batch_size=1, grad_accum=4, epochs=3)
    assert config.look_every(1000, 16) == 1
    for windows, held_out in ((64, 16), (64, 32), (200, 32), (30, 100)):
        steps = config.steps(windows)
        checkpoints = -(-steps // config.check_every(steps))
        looks = -(-checkpoints // config.look_every(windows, held_out))
        assert looks == 1 or looks * held_out / 3 <= windows * 3 / 5
    assert all(-(-steps // config.check_every(steps)) <= 10 for steps in range(1, 2000))
    assert replace(config, check_steps=2).look_every(30, 100) == 1


def test_a_short_training_is_looked_at_in_the_end_and_its_checkpoints_stay(trained_dir, text, tmp_path):
    record, _ = train(trained_dir, text, tmp_path, replace(LORA, epochs=1, grad_accum=1))
    assert [row["step"] for row in record["held_out"]] == [0, 6, 12] and record["steps"] == 12
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_the_best_state_is_kept(trained_dir, text, tmp_path):
    config = replace(LORA, method="full", lr=2e-3, epochs=12, check_steps=6, warmup_steps=0)  # learns the few windows by heart
    record, weights = train(trained_dir, text, tmp_path, config)
    losses = {row["step"]: row["eval_loss"] for row in record["held_out"] if row["step"]}
    assert record["kept_step"] == min(losses, key=losses.get) < record["steps"]
    kept = half_pruned(trained_dir)
    kept.model.load_state_dict(weights)
    rows = text.held_out["wikitext2"].windows
    with torch.no_grad():
        loss = kept.model(input_ids=rows, labels=rows).loss.item()
    assert loss == pytest.approx(min(losses.values()), rel=1e-4)


def test_a_loss_that_breaks_late_leaves_the_last_good_checkpoint(trained_dir, text, tmp_path, monkeypatch):
    class Broken(finetuner.RecoveryTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (float("nan") if self.state.global_step >= 9 else 1)

    monkeypatch.setattr(finetuner, "RecoveryTrainer", Broken)
    with pytest.raises(RunError, match=r"became infinite, or .* in step 10: use LoRA .*the last good state is kept in "):
        train(trained_dir, text, tmp_path, replace(LORA, check_steps=4))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-8"


def divergence(teacher, student, rows) -> float:
    """Mean KL of windows, whole logits at once."""
    with torch.no_grad():
        theirs, ours = (each.model(input_ids=rows).logits[:, :-1].log_softmax(-1) for each in (teacher, student))
    return (theirs.exp() * (theirs - ours)).sum(-1).mean().item()


@pytest.mark.parametrize("drawn", [False, True])
def test_a_distilled_model_comes_closer_to_its_teacher(trained_dir, text, tmp_path, drawn):
    dense = load_model(find_model(str(trained_dir), "--teacher"), dtype="float32", device="cpu")
    distill = DistillConfig(distill=True, distill_alpha=1.0, teacher_draws=200)
    more = {"teacher": dense.model}
    if drawn:
        kept = DrawnAnswers(tmp_path / "answers", "mark")
        more = {"answers": draw_answers(lambda: dense.runner, torch.cat(text.all()), distill, kept, seed=0)}
    record, _ = train(trained_dir, text, tmp_path / "training", replace(LORA, distill=distill, check_steps=6), **more)
    first, last = record["held_out"][0], record["held_out"][-1]
    assert last["eval_wikitext2_kl"] < 0.5 * first["eval_wikitext2_kl"]
    pruned, held_out = half_pruned(trained_dir), text.held_out["wikitext2"].windows
    assert record["curve"][0][1] == pytest.approx(divergence(dense, pruned, text.rows.windows), rel=0.3)  # of a batch
    assert (first["step"], first["eval_wikitext2_kl"]) == (0, pytest.approx(divergence(dense, pruned, held_out), rel=0.1))
    assert last["eval_loss"] == pytest.approx(last["eval_wikitext2_kl"], rel=1e-5)  # the divergence alone is trained on


def test_answers_are_drawn_once_and_alike_whatever_was_drawn_before(trained_dir, text, tmp_path, monkeypatch):
    monkeypatch.setattr("LLMPruner.trainer.teacher.GROUP", 4)
    dense, windows = load_model(find_model(str(trained_dir), "--teacher"), dtype="float32", device="cpu"), text.all()[0]
    config = DistillConfig(distill=True, teacher_draws=5)
    whole = draw_answers(lambda: dense.runner, windows, config, DrawnAnswers(tmp_path / "whole", "mark"), seed=1)
    part = DrawnAnswers(tmp_path / "part", "mark")
    draw_answers(lambda: dense.runner, windows[:8], config, part, seed=1)
    draw_answers(lambda: dense.runner, windows, config, part, seed=1)
    for index in range(len(windows)):
        for name, value in whole[index].items():
            assert value.equal(part[index][name])
    assert whole[0]["tokens"].shape == (32, 5)
    draw_answers(lambda: pytest.fail("asked again"), windows, config, part, seed=1)
    other = DrawnAnswers(tmp_path / "part", "another run")
    assert not other.has(0)
