"""Recovery training: it lowers the loss, touches what it should, leaves a plain model, and stops where it breaks."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from conftest import each_architecture, geometry_of, half_pruned, plain_text, random_plan, random_windows, tiny_model
from transformers import AutoModelForCausalLM

from LLMPruner.data.training import TrainingRows
from LLMPruner.data.windows import IGNORED, load_windows
from LLMPruner.errors import RunError
from LLMPruner.evaluator.ppl import perplexity
from LLMPruner.export.hf import write_hf
from LLMPruner.families.llama import LLAMA
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import LoadedModel, load_model, save_model
from LLMPruner.model.source import find_model
from LLMPruner.trainer import arguments, finetuner, progress, trained
from LLMPruner.trainer.batch import Batch
from LLMPruner.trainer.finetuner import finetune
from LLMPruner.trainer.loop import Rows
from LLMPruner.trainer.loss import Student
from LLMPruner.training_config import FinetuneConfig, LoraConfig

LORA = FinetuneConfig(lr=1e-2, samples=48, epochs=2, seq_len=32, batch_size=4, grad_accum=2, lora=LoraConfig(dropout=0.0))
FULL = replace(LORA, method="full", lr=2e-3)
SHORT = replace(LORA, samples=8, epochs=1, grad_accum=1)  # two steps


@pytest.fixture
def pruned(trained_dir) -> LoadedModel:
    return half_pruned(trained_dir)


@pytest.fixture
def windows(tokenizer, data_dir):
    """Windows of a split: train (random) or test (evenly spread)."""

    def cut(split, samples, config=LORA):
        seed = 0 if split == "train" else None
        return load_windows(
            tokenizer, "wikitext2", split, seq_len=config.seq_len, samples=samples, data_dir=str(data_dir), seed=seed
        )

    return cut


def tune(loaded, config, rows, *, seed, folder=None, **places):
    """`finetune` on plain windows of one corpus; `places` are its own."""
    return finetune(loaded, config, plain_text(rows), seed=seed, places=finetuner.Places(folder, **places))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(model, before) -> set[str]:
    """Last parts of the names of the weights that are not what they were."""
    assert model.state_dict().keys() == before.keys()
    return {name.split(".")[-2] for name, value in model.state_dict().items() if not value.equal(before[name])}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_windows(2, 16)).logits


@pytest.mark.parametrize("config", [LORA, FULL], ids=["lora", "full"])
def test_training_lowers_the_loss_and_the_ppl_of_text_it_never_saw(pruned, windows, config):
    train, test = windows("train", config.samples), windows("test", 12)
    assert len(train) == config.samples
    before = perplexity(pruned.model, train), perplexity(pruned.model, test)
    record = tune(pruned, config, train, seed=0)
    after = perplexity(pruned.model, train), perplexity(pruned.model, test)
    assert after[0] < 0.9 * before[0] and after[1] < 0.9 * before[1]
    assert record["steps"] == 48 // 8 * 2 and record["method"] == config.method and record["learning_rate"] == config.lr
    assert record["loss_first"] == pytest.approx(math.log(before[0]), rel=0.2)  # one batch, against the mean of all
    assert record["loss_last"] < record["loss_first"]


def test_the_first_logged_loss_is_the_models_own_on_the_same_tokens(pruned, windows):
    train = windows("train", 8)
    expected = math.log(perplexity(pruned.model, train))
    config = replace(LORA, samples=8, epochs=1, batch_size=4, grad_accum=2)  # one step over all of them
    assert tune(pruned, config, train, seed=0)["loss_first"] == pytest.approx(expected, rel=1e-4)


def test_lora_leaves_a_plain_model_of_the_same_shapes(pruned, windows):
    model, kinds = pruned.model, [type(module) for module in pruned.model.modules()]
    before = weights(model)
    record = tune(pruned, SHORT, windows("train", 8), seed=0)
    assert pruned.model is model and [type(module) for module in model.modules()] == kinds
    assert {name: value.shape for name, value in before.items()} == {n: v.shape for n, v in model.state_dict().items()}
    assert not hasattr(model, "peft_config") and "forward" not in vars(model)
    assert not model.training and model.config.use_cache is True and not any(p.requires_grad for p in model.parameters())
    rank = sum(sum(value.shape) for name, value in before.items() if "_proj" in name) * SHORT.lora.r
    assert record["trainable_parameters"] == rank
    tune(pruned, SHORT, windows("train", 8), seed=0)  # and once more: nothing of the first time is in the way
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize(
    ("attention", "mlp", "expected"),
    [
        (True, False, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (False, True, {"gate_proj", "up_proj", "down_proj"}),
        (True, True, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_lora_changes_its_targets_and_nothing_else(pruned, windows, attention, mlp, expected):
    before = weights(pruned.model)
    config = replace(SHORT, lora=LoraConfig(target_attention=attention, target_mlp=mlp))
    tune(pruned, config, windows("train", 8), seed=0)
    assert changed(pruned.model, before) == expected


def test_full_fine_tuning_changes_every_weight(pruned, windows):
    before = weights(pruned.model)
    record = tune(pruned, replace(SHORT, method="full"), windows("train", 8), seed=0)
    assert all(not value.equal(before[name]) for name, value in pruned.model.state_dict().items())
    assert record["trainable_parameters"] == pruned.plan.total_params


def test_the_saved_adapter_on_the_old_weights_is_the_merged_model(pruned, windows, tmp_path):
    before = weights(pruned.model)
    untrained = logits(pruned.model)
    tune(pruned, LORA, windows("train", 48), seed=0, adapter=tmp_path / "adapter")
    merged = logits(pruned.model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]  # no temporary sibling
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    pruned.model.load_state_dict(before)
    adapted = peft.PeftModel.from_pretrained(pruned.model, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(adapted), merged, rtol=1e-4, atol=1e-4)
    assert (merged - untrained).abs().max() > 0.1


def test_a_new_adapter_replaces_an_old_one_whole(pruned, windows, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "stale.txt").write_text("of an earlier run")
    tune(pruned, SHORT, windows("train", 8), seed=0, adapter=folder)
    assert "stale.txt" not in {path.name for path in folder.iterdir()}


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(trained_dir, windows):
    results = []
    for seed in (3, 3, 4):
        loaded = load_model(find_model(str(trained_dir), "--model_path"), dtype="float32", device="cpu")
        tune(loaded, SHORT, windows("train", 8), seed=seed)
        results.append(loaded.model.model.layers[0].self_attn.q_proj.weight)
    assert results[0].equal(results[1]) and not results[0].equal(results[2])


@each_architecture
@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_pruned_architecture_trains_and_reloads(changes, method, tokenizer, tmp_path):
    model = tiny_model(**changes)
    plan = random_plan(geometry_of(model))
    apply_plan(LayerRunner.of(model), plan)
    loaded = LoadedModel(model, tokenizer, plan, {})
    rows = random_windows(8, 16)
    before = perplexity(model, rows)
    tune(loaded, replace(FULL, method=method, lr=5e-3, epochs=4, grad_accum=1, warmup_steps=0), rows, seed=0)
    assert perplexity(loaded.model, rows) < before
    save_model(tmp_path / "m.bin", loaded)
    again = load_model(find_model(str(tmp_path / "m.bin"), "--model_path"), dtype="float32", device="cpu")
    assert again.plan == plan and logits(again.model).equal(logits(loaded.model))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_half_precision_stays_half_and_small_steps_still_count(pruned, windows, method):
    pruned.model.bfloat16()
    pruned.model.model.rotary_emb = tiny_model().model.rotary_emb  # float32, as load_model leaves it
    table = pruned.model.model.rotary_emb.inv_freq.clone()
    train = windows("train", 48)
    before = perplexity(pruned.model, train)
    config = replace(FULL, lr=2e-4, epochs=4) if method == "full" else LORA
    tune(pruned, config, train, seed=0)
    assert {value.dtype for value in pruned.model.parameters()} == {torch.bfloat16}
    assert pruned.model.model.rotary_emb.inv_freq.equal(table)
    assert perplexity(pruned.model, train) < 0.95 * before


def test_small_steps_add_up_while_bfloat16_weights_are_fully_trained():
    model = tiny_model().bfloat16()
    norm = model.model.norm.weight  # ones: 1 + 1e-4 is 1 in bfloat16
    with trained.float32_weights(model):
        for _ in range(100):
            norm.data += 1e-4
    assert norm.dtype == torch.bfloat16 and (norm.float() - 1.01).abs().max() < 0.004


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_loss_that_is_not_a_number_stops_with_advice_and_leaves_nothing(pruned, windows, tmp_path, method):
    pruned.model.model.norm.weight.data[0] = math.nan
    before = weights(pruned.model)
    with pytest.raises(RunError, match="loss became nan in step 1: use LoRA .*--use_lora --lora_target_attention") as error:
        tune(pruned, replace(SHORT, method=method), windows("train", 8), seed=0, adapter=tmp_path / "adapter")
    assert "\n" not in str(error.value) and "--lora_target_mlp --lr 2e-4" in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert pruned.model.state_dict().keys() == before.keys()  # no adapter is left in the model
    assert pruned.model.config.use_cache is True and not pruned.model.training


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_broken_gradient_of_the_very_last_step_stops_before_the_weights(pruned, windows, monkeypatch, max_grad_norm):
    backward_passes = []

    class Broken(finetuner.RecoveryTrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            backward_passes.append(loss)
            if len(backward_passes) == 2:  # of two
                next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf
            return loss

    monkeypatch.setattr(finetuner, "RecoveryTrainer", Broken)
    with pytest.raises(RunError, match="(gradient|training loss) became (infinite, or no number,|nan) in step 2"):
        tune(pruned, replace(SHORT, method="full", max_grad_norm=max_grad_norm), windows("train", 8), seed=0)
    assert all(torch.isfinite(value).all() for value in pruned.model.parameters())


def test_an_interrupted_lora_gives_the_old_weights_back(pruned, windows, monkeypatch):
    before = weights(pruned.model)

    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuner.Progress, "on_step_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tune(pruned, SHORT, windows("train", 8), seed=0)
    assert changed(pruned.model, before) == set()


def test_progress_is_plain_lines_that_name_first_and_last_step(pruned, windows, capfd, monkeypatch):
    logged = []
    monkeypatch.setattr(progress.logger, "info", lambda text, *values: logged.append(text % values))
    config = replace(LORA, samples=43, epochs=1, batch_size=1, grad_accum=1, lr=1e-3)
    tune(pruned, config, windows("train", 43), seed=0)
    lines = [line for line in logged if line.startswith("step ")]
    assert lines[0].startswith("step 1 of 43  loss ") and lines[-1].startswith("step 43 of 43  loss ")
    assert 20 <= len(lines) <= 24 and "lr" in lines[1]
    output = capfd.readouterr()
    assert "it/s" not in output.err and "train_runtime" not in output.out


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_the_adapter_on_the_export_of_the_pruned_model_is_the_merged_model(pruned, windows, tmp_path, variant):
    write_hf(tmp_path / "hf", pruned, {})
    config = replace(LORA, lora=LoraConfig(dropout=0.0, **variant))
    tune(pruned, config, windows("train", 48), seed=0, adapter=tmp_path / "adapter")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    untrained = logits(exported)
    adapted = peft.PeftModel.from_pretrained(exported, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(adapted), logits(pruned.model), rtol=1e-4, atol=1e-4)
    assert (logits(adapted) - untrained).abs().max() > 0.1


def arguments_of(config, count=1000, at_once=1, seed=0):
    batch, student = Batch(at_once, recompute=False), Student(tiny_model(), config.distill)
    return arguments.arguments(config, config.steps(count), batch, Path("unused"), student, seed)


def test_warm_up_is_as_asked_and_by_default_at_most_a_tenth_of_the_steps():
    config = replace(LORA, epochs=3, batch_size=1, grad_accum=4, warmup_steps=None)
    assert arguments_of(config)["warmup_steps"] == 75  # of 750
    assert arguments_of(replace(config, warmup_steps=100))["warmup_steps"] == 100
    assert arguments_of(config, 9)["warmup_steps"] == 0


def test_every_setting_reaches_the_trainer_and_peft():
    lora = LoraConfig(r=3, alpha=7, dropout=0.25, use_dora=True, use_rslora=True)
    config = FinetuneConfig(
        lr=3e-4, epochs=5, batch_size=6, grad_accum=7, max_grad_norm=0.5, warmup_steps=1, weight_decay=0.03, lora=lora
    )
    values = arguments_of(config, at_once=14, seed=11)
    made = arguments.training_arguments(values, torch.device("cpu"))
    assert (made.learning_rate, made.num_train_epochs, made.per_device_train_batch_size) == (3e-4, 5, 14)
    assert (made.gradient_accumulation_steps, made.max_grad_norm, made.weight_decay) == (3, 0.5, 0.03)
    assert (made.seed, made.data_seed, made.warmup_steps) == (11, 11, 1)
    assert made.report_to == [] and made.save_total_limit is None and made.logging_nan_inf_filter is False
    assert values["optim"] == "adamw_torch_fused"
    assert arguments_of(replace(config, optimizer="adamw_8bit"))["optim"] == "adamw_bnb_8bit"
    with trained.adapters(tiny_model(), LLAMA, lora, 0) as adapted:
        settings = adapted.peft_config["default"]
        assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (3, 7, 0.25)
        assert settings.use_dora and settings.use_rslora


@pytest.mark.parametrize(
    ("device", "precision", "native_bf16", "expected"),
    [
        ("cpu", torch.bfloat16, True, None),
        ("cuda", torch.float32, True, None),  # --dtype float32 is the cure for NaN: no autocast
        ("cuda", torch.bfloat16, True, torch.bfloat16),
        ("cuda", torch.float16, True, torch.bfloat16),
        ("cuda", torch.float16, False, torch.float16),
    ],
)
def test_autocast_only_where_it_makes_sense(monkeypatch, device, precision, native_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native_bf16)
    assert arguments.autocast_dtype(SimpleNamespace(device=torch.device(device), dtype=precision)) == expected


@pytest.mark.parametrize("method", ["lora", "full"])
def test_products_are_computed_in_the_precision_of_the_weights_as_loaded(pruned, windows, monkeypatch, method):
    monkeypatch.setattr(finetuner, "autocast_dtype", lambda model: None if model.dtype == torch.float32 else torch.bfloat16)
    made = []
    monkeypatch.setattr(finetuner, "RecoveryTrainer", lambda **settings: made.append(settings) or pytest.skip("seen"))
    pruned.model.bfloat16()
    with pytest.raises(pytest.skip.Exception):
        tune(pruned, replace(SHORT, method=method), windows("train", 8), seed=0)
    assert made[0]["model"].precision == torch.bfloat16 and made[0]["args"].bf16


@pytest.mark.parametrize(("place", "wanted"), [("cuda:1", "cuda:1"), ("cuda:0", "cpu"), ("cuda", "cpu"), ("cpu", "cpu")])
def test_training_stays_on_the_gpu_that_has_the_model(tmp_path, monkeypatch, place, wanted):
    """By itself the Trainer takes the first GPU, which is a CPU here."""
    made = arguments.training_arguments(arguments_of(LORA) | {"output_dir": str(tmp_path)}, torch.device("cpu"))
    monkeypatch.setattr(made.distributed_state, "device", made.distributed_state.device)  # shared by all: put back afterwards
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    made._n_gpu = 4
    monkeypatch.setattr(arguments, "TrainingArguments", lambda **_: made)
    arguments.training_arguments({}, torch.device(place))
    assert made.n_gpu == 1 and made.device == made.distributed_state.device == torch.device(wanted)
    assert chosen == ([torch.device(place)] if wanted != "cpu" else [])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_recomputed_activations_change_no_result(trained_dir, windows, monkeypatch, method):
    results = []
    for recompute in (False, True):
        loaded = load_model(find_model(str(trained_dir), "--model_path"), dtype="float32", device="cpu")
        monkeypatch.setattr(finetuner, "choose_batch", lambda *_, on=recompute: Batch(4, recompute=on))
        tune(loaded, replace(SHORT, method=method), windows("train", 8), seed=0)
        assert not loaded.model.is_gradient_checkpointing and not loaded.model.model.embed_tokens._forward_hooks
        results.append(logits(loaded.model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_is_the_same_however_many_windows_are_computed_at_once(trained_dir, windows, method):
    results = []
    for at_once in (1, 2, 4):
        loaded = load_model(find_model(str(trained_dir), "--model_path"), dtype="float32", device="cpu")
        config = replace(SHORT, method=method, samples=10, batch_size=1, grad_accum=4, micro_batch=at_once)
        record = tune(loaded, config, windows("train", 10), seed=0)  # the last step has two windows
        results.append((record["curve"], logits(loaded.model)))
        assert record["steps"] == 3
    for curve, found in results[1:]:
        assert curve == pytest.approx(np.array(results[0][0]), rel=1e-5)
        torch.testing.assert_close(found, results[0][1], rtol=1e-4, atol=1e-4)


def test_the_precision_is_not_the_launchers(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    made = arguments.training_arguments(arguments_of(LORA), torch.device("cpu"))
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no" and getattr(made, "mixed_precision", "no") == "no"


def test_windows_are_filled_up_for_several_processes_with_some_of_which_nothing_is_learned():
    windows = random_windows(5, 16)
    rows = TrainingRows.plain(windows)
    assert len(Rows(rows, None)) == 5 and len(Rows(rows, None, multiple=5)) == 5
    filled = Rows(rows, None, multiple=4)
    assert len(filled) == 8
    learned = [int(filled[index]["labels"].ne(IGNORED).sum()) for index in range(8)]
    assert learned == [windows.shape[1] - 1] * 5 + [0] * 3 and filled[7]["input_ids"].equal(windows[0])


def test_a_training_that_made_the_model_worse_says_so(pruned, windows, caplog):
    text = plain_text(windows("train", 48), {"wikitext2": windows("test", 8)})
    record = finetune(pruned, replace(LORA, lr=1.0, max_grad_norm=0.0), text, seed=0)
    first, last = record["held_out"][0], record["held_out"][-1]
    assert first["step"] == 0 and first["eval_loss"] < last["eval_loss"]
    assert "better on held-out text than the model before training" in caplog.text
