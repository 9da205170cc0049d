"""Every load gives the same model, whatever it is stored as; weights that do not fit are refused."""

from __future__ import annotations

import pytest
import torch
from conftest import each_architecture, geometry_of, random_windows, tiny_model
from safetensors.torch import load_file, save_file

from LLMPruner.errors import DamagedError, RunError
from LLMPruner.model.checkpoint import load_checkpoint
from LLMPruner.model.load import LoadedModel, assign_weights, build_empty, load_model, save_model
from LLMPruner.model.size import count_parameters
from LLMPruner.model.source import find_model
from LLMPruner.model.tensors import StoredTensors
from LLMPruner.plan import PruningPlan

FLAG = "--base_model"
WINDOWS = random_windows()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(WINDOWS).logits


@each_architecture
def test_a_directory_is_inspected_and_loaded(model_dir, changes):
    path, model = model_dir(**changes), tiny_model(**changes)
    source = find_model(str(path), FLAG)
    assert source.kind == "hf" and source.geometry == geometry_of(model) and source.plan.is_dense
    loaded = load_model(source, dtype="float32", device="cpu")
    assert torch.equal(logits(loaded.model), logits(model)) and not loaded.model.training
    assert loaded.provenance == {"base_model": str(path), "dense_parameters": count_parameters(model)}


@each_architecture
def test_our_bin_brings_back_the_pruned_model(pruned_bin, changes):
    path, model, plan = pruned_bin(**changes)
    source = find_model(str(path), FLAG)
    assert source.kind == "bin" and source.plan == plan and source.geometry == plan.geometry
    loaded = load_model(source, dtype="float32", device="cpu")
    assert torch.equal(logits(loaded.model), logits(model)) and not loaded.model.training
    assert loaded.provenance == {"base_model": "tiny", "seed": 1}
    assert loaded.model.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_saving_what_was_loaded_changes_nothing(pruned_bin, tmp_path):
    first = load_model(find_model(str(pruned_bin()[0]), FLAG), dtype="float32", device="cpu")
    save_model(tmp_path / "again.bin", first)
    second = load_model(find_model(str(tmp_path / "again.bin"), FLAG), dtype="float32", device="cpu")
    assert torch.equal(logits(first.model), logits(second.model)) and second.plan == first.plan


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_come_in_the_asked_precision(model_dir, pruned_bin, dtype):
    for path in (model_dir(), pruned_bin()[0]):
        model = load_model(find_model(str(path), FLAG), dtype=dtype, device="cpu").model
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32, "rotary angles lose too much in 16 bits"


def test_a_tied_head_is_stored_once_and_tied_again(pruned_bin, model_dir):
    path, _, _ = pruned_bin(tie_word_embeddings=True)
    assert "lm_head.weight" not in load_checkpoint(path)[0]
    model = load_model(find_model(str(path), FLAG), dtype="float32", device="cpu").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = [name for name, _ in StoredTensors(find_model(str(model_dir(tie_word_embeddings=True)), FLAG)).items()]
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names


@each_architecture
def test_open_tensors_lists_every_weight_once(model_dir, changes):
    tensors = dict(StoredTensors(find_model(str(model_dir(**changes)), FLAG)))
    assert sum(tensor.numel() for tensor in tensors.values()) == count_parameters(tiny_model(**changes))


def test_missing_weights_are_refused_not_invented(model_dir):
    folder = model_dir()
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamagedError, match=r"lacks weights .*, model\.layers\.1\.mlp\.up_proj\.weight for one"):
        find_model(str(folder), FLAG)
    with pytest.raises(RunError, match=r"do not fit the plan: model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load_model(find_model(str(folder), FLAG, faulty=True), dtype="float32", device="cpu")


def test_truncated_weights_are_refused(model_dir):
    folder = model_dir()
    file = folder / "model.safetensors"
    source = find_model(str(folder), FLAG)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DamagedError, match="is damaged"):
        find_model(str(folder), FLAG, faulty=True)
    with pytest.raises(RunError, match="damaged"):
        list(StoredTensors(source).items())  # what happens to a file after it was inspected


def test_a_bin_whose_weights_do_not_fit_its_plan_is_refused(pruned_bin, tokenizer, tmp_path):
    _, model, plan = pruned_bin()
    wrong = PruningPlan.dense(plan.geometry)
    save_model(tmp_path / "wrong.bin", LoadedModel(model, tokenizer, wrong, {}))
    with pytest.raises(RunError, match="do not fit the plan"):
        load_model(find_model(str(tmp_path / "wrong.bin"), FLAG), dtype="float32", device="cpu")


def test_a_loaded_model_has_one_store_and_one_runner_of_it(model_dir):
    loaded = load_model(find_model(str(model_dir()), FLAG), dtype="float32", device="cpu")
    assert loaded.store.model is loaded.model and loaded.runner.store is loaded.store and loaded.runner is loaded.runner


def test_a_model_whose_tokenizer_is_loaded_already_keeps_it(model_dir, tokenizer):
    source = find_model(str(model_dir()), FLAG)
    assert load_model(source, dtype="float32", device="cpu", tokenizer=tokenizer).tokenizer is tokenizer


@each_architecture
def test_an_empty_model_has_the_plans_shapes_and_no_weights(pruned_bin, changes):
    _, model, plan = pruned_bin(**changes)
    empty = build_empty(model.config, plan)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    filled = assign_weights(empty, model.state_dict().items(), torch.float32)
    assert torch.equal(logits(filled), logits(model)) and not filled.training


@pytest.mark.parametrize("wrong", ["missing", "extra", "shape"])
def test_weights_that_are_not_the_models_are_refused_by_name(wrong):
    model = tiny_model()
    state, name = dict(model.state_dict()), "model.layers.1.mlp.up_proj.weight"
    if wrong == "extra":
        state["model.layers.9.weight"], name = torch.ones(2), "model.layers.9.weight is .2,., expected absent"
    elif wrong == "missing":
        del state[name]
        name += " is missing"
    else:
        state[name] = torch.ones(2, 3)
        name += r" is \(2, 3\), expected \(96, 64\)"
    with pytest.raises(RunError, match="do not fit the plan: " + name):
        assign_weights(build_empty(model.config, PruningPlan.dense(geometry_of(model))), state.items(), torch.float32)


def test_a_value_that_is_no_tensor_is_told(tmp_path, pruned_bin):
    payload = torch.load(pruned_bin()[0], weights_only=True)
    torch.save(payload | {"epoch": 3}, tmp_path / "model.bin")
    with pytest.raises(RunError, match="damaged: epoch is no tensor"):
        load_model(find_model(str(tmp_path / "model.bin"), "--model_path"), device="cpu")
