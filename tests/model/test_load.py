"""Model sources: what is found, what is refused before any weight is read, and that every load gives the same model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import each_architecture, geometry_of, random_plan, random_windows, tiny_model
from LLMPruner.checkpoint import load_checkpoint
from LLMPruner.forward import LayerRunner
from LLMPruner.source import check_seq_len, find_model
from safetensors.torch import load_file, save_file

from LLMPruner.errors import RunError, UsageError
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model import (
    LoadedModel,
    count_parameters,
    load_model,
    load_tokenizer,
    open_tensors,
    resolve_device,
    resolve_dtype,
    save_model,
)
from LLMPruner.plan import PruningPlan

FLAG = "--base_model"
WINDOWS = random_windows()


@pytest.fixture
def model_dir(tmp_path, tokenizer):
    """Saves a tiny model as a HF directory and returns its path."""

    def save(name="model", seed=0, **changes):
        folder = tmp_path / name
        tiny_model(seed, **changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def pruned_bin(tmp_path, tokenizer):
    """Prunes a tiny model at random, saves our .bin, and returns its path and the model."""

    def save(**changes):
        model = tiny_model(**changes)
        plan = random_plan(geometry_of(model))
        apply_plan(LayerRunner(model), plan)
        path = tmp_path / "pytorch_model.bin"
        save_model(path, LoadedModel(model, tokenizer, plan, {"base_model": "tiny", "seed": 1}))
        return path, model, plan

    return save


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


def test_the_bins_tokenizer_is_the_models(pruned_bin, tokenizer):
    copy = load_tokenizer(find_model(str(pruned_bin()[0]), FLAG))
    text = "The cat chases the mouse quickly ."
    assert copy(text).input_ids == tokenizer(text).input_ids and copy.eos_token == tokenizer.eos_token


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
    names = [name for name, _ in open_tensors(find_model(str(model_dir(tie_word_embeddings=True)), FLAG))]
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names


@each_architecture
def test_open_tensors_lists_every_weight_once(model_dir, changes):
    tensors = dict(open_tensors(find_model(str(model_dir(**changes)), FLAG)))
    assert sum(tensor.numel() for tensor in tensors.values()) == count_parameters(tiny_model(**changes))


def test_the_fingerprint_follows_the_model_not_the_folder(model_dir, tmp_path):
    first = find_model(str(model_dir("first")), FLAG)
    other = find_model(str(model_dir("other", seed=1)), FLAG)
    moved = find_model(str(shutil.copytree(first.path, tmp_path / "moved")), FLAG)
    assert first.fingerprint() == moved.fingerprint() != other.fingerprint()
    config = json.loads((moved.path / "config.json").read_text())
    (moved.path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    assert find_model(str(moved.path), FLAG).fingerprint() != first.fingerprint()


def test_a_single_changed_weight_changes_the_fingerprint(model_dir):
    source = find_model(str(model_dir()), FLAG)
    before, file = source.fingerprint(), source.path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert source.fingerprint() != before


def test_missing_weights_are_refused_not_invented(model_dir):
    folder = model_dir()
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"lacks weights: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(find_model(str(folder), FLAG), dtype="float32", device="cpu")


def test_truncated_weights_are_refused(model_dir):
    folder = model_dir()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    source = find_model(str(folder), FLAG)
    with pytest.raises(RunError, match="cannot be loaded"):
        load_model(source, dtype="float32", device="cpu")
    with pytest.raises(RunError, match="damaged"):
        list(open_tensors(source))


def test_a_bin_whose_weights_do_not_fit_its_plan_is_refused(pruned_bin, tokenizer, tmp_path):
    _, model, plan = pruned_bin()
    wrong = PruningPlan.dense(plan.geometry)
    save_model(tmp_path / "wrong.bin", LoadedModel(model, tokenizer, wrong, {}))
    with pytest.raises(RunError, match="do not fit the plan"):
        load_model(find_model(str(tmp_path / "wrong.bin"), FLAG), dtype="float32", device="cpu")


def test_a_missing_path_is_refused_by_its_flag():
    for path in ("nowhere/at/all", "nowhere.bin", "nowhere/model.gguf", "./a/b"):
        with pytest.raises(UsageError, match=f"{FLAG} .*does not exist"):
            find_model(path, FLAG)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (None, "it has no config.json"),
        ("{", "is not JSON"),
        ("[]", "model_type is None"),
        ('{"model_type": "gpt2"}', "model_type is 'gpt2'"),
        ('{"model_type": "llama"}', "not a usable Llama"),
    ],
)
def test_a_directory_that_is_no_llama_is_refused(tmp_path, config, complaint):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UsageError, match=complaint):
        find_model(str(tmp_path), FLAG)


def test_a_directory_without_safetensors_is_refused(model_dir):
    folder = model_dir()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="no .*safetensors weights"):
        find_model(str(folder), FLAG)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("model.gguf", "not a readable GGUF file"),
        ("model.bin", "not a checkpoint of this tool|is empty: copy"),
        ("model.txt", f"{FLAG} .*is not a model"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"just text, and longer than any header would be", b"GGUF\x03\x00\x00\x00"])
def test_a_file_of_the_wrong_content_is_refused(tmp_path, name, complaint, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=complaint):
        find_model(str(tmp_path / name), FLAG)


def test_a_gguf_of_another_architecture_is_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match="its architecture is 'qwen2'"):
        find_model(str(tmp_path / "model.gguf"), FLAG)


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch, tmp_path):
    import huggingface_hub

    def offline(repo, **_):
        raise ConnectionError(f"no route to {repo}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UsageError, match=f"{FLAG} meta-llama/Llama-3.1-8B .*ConnectionError.*pass a local directory"):
        find_model("meta-llama/Llama-3.1-8B", FLAG)


def test_a_hub_id_is_downloaded_without_pickles(monkeypatch, model_dir, tmp_path):
    import huggingface_hub

    asked = {}
    folder = model_dir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **options: asked.update(options, repo=repo) or folder
    )
    assert find_model("someone/tiny-llama", FLAG).path == folder
    assert asked["repo"] == "someone/tiny-llama" and not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_windows_longer_than_the_positions_are_refused(model_dir):
    source = find_model(str(model_dir()), FLAG)
    check_seq_len(source, "--eval_seq_len", 256)
    with pytest.raises(UsageError, match="--eval_seq_len 257 is longer than the model's 256 positions"):
        check_seq_len(source, "--eval_seq_len", 257)


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(UsageError, match=f"--device {name} is not available"):
        resolve_device(name)


def test_the_default_precision_is_16_bit_on_a_gpu():
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16
