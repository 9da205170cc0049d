"""A streamed model is the resident one, bit by bit, and holds one layer at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import each_architecture, geometry_of, random_plan, random_windows, tiny_model

from LLMPruner.data.windows import IGNORED, cut
from LLMPruner.evaluator.massive import lengths_and_last
from LLMPruner.evaluator.ppl import perplexity_of
from LLMPruner.families.slicing import is_removed
from LLMPruner.importance.criteria import CRITERIA, score_units
from LLMPruner.importance.layer_analyzer import LAYER_METHODS
from LLMPruner.methods import apply
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.finished import FinishedLayers
from LLMPruner.model.fit import Streaming
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import load_model, save_model
from LLMPruner.model.source import find_model
from LLMPruner.plan import LayerPlan

FLAG = "--base_model"
WINDOWS = random_windows(9, 12)


@pytest.fixture
def both(model_dir, tmp_path):
    """The same model in memory and streamed, with a few tokens a batch, and almost all hidden states in files."""

    def load(dtype="float32", limit=4096, **changes):
        source = find_model(str(model_dir(**changes)), FLAG)
        settings = {"dtype": dtype, "device": "cpu"}
        loaded = load_model(source, **settings), load_model(source, stream=Streaming(tmp_path / "work", limit), **settings)
        for model in loaded:
            model.runner.batch_tokens = 36
        return loaded

    return load


def state(loaded) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in loaded.store.tensors()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(
        value.equal(other[name]) and value.dtype == other[name].dtype for name, value in one.items()
    )


@each_architecture
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_and_what_they_compute_are_the_same(both, changes, dtype):
    resident, streamed = both(dtype, **changes)
    assert equal(state(resident), state(streamed)) and resident.model.dtype == streamed.model.dtype
    hidden = [loaded.runner.layers(loaded.runner.embed(WINDOWS)) for loaded in (resident, streamed)]
    assert torch.equal(*hidden)
    assert torch.equal(*(loaded.runner.head.losses(hidden[0], WINDOWS) for loaded in (resident, streamed)))
    assert perplexity_of(resident.runner, WINDOWS) == perplexity_of(streamed.runner, WINDOWS)
    strided = cut(WINDOWS.flatten(), 9, "own", "test", 4, whole=True)
    assert strided[-1, -1] == IGNORED, "the text ends within a window"
    assert perplexity_of(resident.runner, strided, 4) == perplexity_of(streamed.runner, strided, 4)
    lengths = [lengths_and_last(loaded.runner, WINDOWS)[0] for loaded in (resident, streamed)]
    assert all(one.equal(other) for one, other in zip(*lengths, strict=True))


@pytest.mark.parametrize("method", sorted(LAYER_METHODS))
def test_layer_scores_are_the_same(both, method):
    resident, streamed = (LAYER_METHODS[method](loaded.runner, WINDOWS) for loaded in both())
    assert resident == streamed and len(set(resident)) == 4


@pytest.mark.parametrize("importance", sorted(CRITERIA))
def test_unit_scores_are_the_same(both, importance):
    found = [score_units(loaded.runner, loaded.plan.geometry, importance, windows=WINDOWS, seed=3) for loaded in both()]
    for one, other in zip(*found, strict=True):
        assert one.kv_groups.equal(other.kv_groups) and one.channels.equal(other.channels)


@each_architecture
@pytest.mark.parametrize("repair", ["none", "bias", "least_squares"])
def test_the_healed_model_is_the_same_and_so_are_its_bin_and_what_is_read_of_it(both, tmp_path, changes, repair):
    models = both(**changes)
    plan = random_plan(models[0].plan.geometry)
    plan = plan.with_layer(2, LayerPlan((), plan.layers[2].channels))
    for name, loaded in zip(("resident", "streamed"), models, strict=True):
        apply_plan(loaded.runner, plan, repair=repair, windows=WINDOWS)
        loaded.plan = plan if repair != "bias" else type(plan)(plan.geometry, plan.layers, output_bias=True)
        (tmp_path / name).mkdir()
        save_model(tmp_path / name / "model.bin", loaded)
    assert equal(*map(state, models))
    files = [tmp_path / name / "model.bin" for name in ("resident", "streamed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    source = find_model(str(files[1]), FLAG)
    again = load_model(source, dtype="float32", device="cpu", stream=Streaming(tmp_path / "more", 0))
    assert perplexity_of(again.runner, WINDOWS) == perplexity_of(models[0].runner, WINDOWS)
    assert is_removed(again.store._layers[2].self_attn)


def test_blocks_and_the_last_layers_are_distilled_the_same(both, monkeypatch):
    monkeypatch.setattr(apply, "BLOCK", 2)
    models = both()
    plan = random_plan(models[0].plan.geometry, seed=4)
    for loaded in models:
        options = {"distill_epochs": 2, "distill_model_epochs": 1, "distill_last": 2, "distill_labels": 0.5}
        apply_plan(loaded.runner, plan, repair="least_squares", windows=WINDOWS, **options)
    assert equal(*map(state, models))
    finished = [models[1].store.finished.state(index) for index in range(4)]
    assert finished == [apply.DISTILLED] * 2 + [apply.TAUGHT] * 2


def test_one_layer_is_on_the_device_and_each_is_read_once_a_pass(both):
    _, streamed = both()
    store, seen = streamed.store, []
    read = store._read_layer
    store._read_layer = lambda index: seen.append(index) or read(index)
    for _ in range(2):
        streamed.runner.layers(streamed.runner.embed(WINDOWS))
        held = [index for index in range(4) if not next(store._layers[index].parameters()).is_meta]
        assert held == [3]
    store._ahead = None
    assert seen == [0, 1, 2, 3] * 2
    with store.layer(0), store.layer(2):
        assert store._here == {0, 2}
    with store.layer(1):
        assert store._here == {1}
    seen.clear()
    LAYER_METHODS["removal"](streamed.runner, WINDOWS)
    assert seen == [0, 2, 1, 2, 3][-4:] or seen.count(3) == 1, "all streams go through a layer together"


def test_hidden_states_beyond_the_limit_lie_in_files_that_have_no_name(both, tmp_path):
    _, streamed = both(limit=0)
    hidden = streamed.runner.embed(WINDOWS)
    assert list((tmp_path / "work").iterdir()) == []
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/hidden." in line and "(deleted)" in line]
    assert maps, "it is mapped from a file"
    del hidden
    home = both(limit=1 << 20)[1].runner.home
    room = home.empty((4, 8, 16), torch.float32)
    assert home.held == 4 * 8 * 16 * 4
    del room
    assert home.held == 0


def test_what_was_not_edited_is_read_from_the_model_again(both):
    _, streamed = both()
    before = state(streamed)
    with streamed.store.layer(1) as layer, torch.no_grad():
        layer.mlp.down_proj.weight.zero_()
    with streamed.store.layer(0):
        pass
    assert equal(state(streamed), before)
    with streamed.store.edited((1,), "changed"), streamed.store.layer(1) as layer, torch.no_grad():
        layer.mlp.down_proj.weight.zero_()
    with streamed.store.layer(0):
        pass
    with streamed.store.layer(1) as layer:
        assert not layer.mlp.down_proj.weight.any()
    assert not equal(state(streamed), before)


def test_unchanged_layers_of_another_precision_do_not_count_as_finished(both):
    """They are cast on disk, one at a time, when all weights are asked for."""
    resident, streamed = both("bfloat16")
    streamed.store.settle()
    assert equal(state(resident), state(streamed))
    assert sorted(streamed.store.finished._entries) == [0, 1, 2, 3]
    assert {streamed.store.finished.state(index) for index in range(4)} == {None}


def test_an_edit_that_fails_is_not_kept(both):
    _, streamed = both()
    before = state(streamed)
    with pytest.raises(KeyError), streamed.store.edited((1,), "changed"), streamed.store.layer(1) as layer:
        layer.mlp.down_proj.weight.data.zero_()
        raise KeyError
    assert 1 not in streamed.store.finished and equal(state(streamed), before)


@pytest.mark.parametrize("stop", range(1, 8))
@pytest.mark.parametrize("epochs", [0, 1])
def test_what_died_anywhere_goes_on_to_the_same_model(tmp_path, monkeypatch, stop, epochs):
    """The process dies when it is about to write its `stop`th state of layers; the next one has the dense model again."""
    monkeypatch.setattr(apply, "BLOCK", 2)
    plan = random_plan(geometry_of(tiny_model()), seed=2)
    options = {"repair": "least_squares", "windows": WINDOWS, "distill_epochs": epochs, "distill_model_epochs": epochs}
    options["distill_labels"] = 0.5
    whole = LayerRunner.of(tiny_model())
    apply_plan(whole, plan, **options)
    dying, writes, write = LayerRunner.of(tiny_model()), [], FinishedLayers.write

    def written(self, layers, state):
        writes.append(state)
        if len(writes) == stop:
            raise KeyboardInterrupt
        write(self, layers, state)

    monkeypatch.setattr(FinishedLayers, "write", written)
    dying.store.finished = FinishedLayers(tmp_path)
    died = False
    try:
        apply_plan(dying, plan, **options)
    except KeyboardInterrupt:
        died = True
    assert died == (stop <= (5 if epochs else 3)), "the first layer loses nothing"
    monkeypatch.setattr(FinishedLayers, "write", write)
    healed, heal = [], apply._heal
    monkeypatch.setattr(apply, "_heal", lambda *args: healed.append(args[2]) or heal(*args))
    resumed = LayerRunner.of(tiny_model())
    resumed.store.finished = FinishedLayers(tmp_path)
    apply_plan(resumed, plan, **options)
    assert equal(dict(whole.store.tensors()), dict(resumed.store.tensors()))
    lost = set(healed) - {0}
    assert len(lost) == 3 - min(3, [0, 0, 1, 1, 2, 3, 3, 3][stop] if epochs else stop - 1), "nothing is healed twice"
