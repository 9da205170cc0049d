"""The layer runner is the model: same hidden states, same losses, same gradients, whatever the batch size."""

from __future__ import annotations

import pytest
import torch
from conftest import each_architecture, geometry_of, random_plan, random_windows, tiny_model
from torch.nn import functional

from LLMPruner.families.slicing import slice_sublayer
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner

WINDOWS = random_windows(5, 12)


@torch.no_grad()
def naive_losses(model, windows: torch.Tensor) -> torch.Tensor:
    logits = model(windows).logits[:, :-1]
    nll = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return nll.view(len(windows), -1).double().sum(1)


def naive_gates(model, windows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gate gradients of every token from one plain backward pass: input times its gradient."""
    inputs, handles = [], []

    def keep(_, args):
        args[0].retain_grad()
        inputs.append(args[0])

    for layer in model.model.layers:
        handles += [linear.register_forward_pre_hook(keep) for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    model.zero_grad()
    logits = model(windows).logits[:, :-1]
    functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    gates = [(kept * kept.grad).detach() for kept in inputs]
    return list(zip(gates[::2], gates[1::2], strict=True))


def gathered_gates(runner: LayerRunner, windows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    parts: dict[int, list] = {}
    runner.gate_gradients(windows, lambda index, gates: parts.setdefault(index, []).append(gates))
    return [tuple(torch.cat(side) for side in zip(*parts[index], strict=True)) for index in range(runner.num_layers)]


@each_architecture
@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
def test_hidden_states_and_losses_equal_the_models(changes, pruned):
    model = tiny_model(**changes)
    runner = LayerRunner.of(model)
    if pruned:
        apply_plan(runner, random_plan(geometry_of(model)))
    hidden = runner.embed(WINDOWS)
    states = model(WINDOWS, output_hidden_states=True).hidden_states
    for index in range(runner.num_layers - 1):  # the model's last hidden state is normed
        torch.testing.assert_close(hidden, states[index])
        hidden = runner.layer(index, hidden)
    hidden = runner.layer(runner.num_layers - 1, hidden)
    torch.testing.assert_close(model.model.norm(hidden), states[-1])
    torch.testing.assert_close(runner.head.losses(hidden, WINDOWS), naive_losses(model, WINDOWS), rtol=1e-5, atol=1e-5)


def test_the_prefixes_are_the_hidden_states_before_every_layer_and_after_the_last():
    runner = LayerRunner.of(tiny_model())
    prefixes = runner.prefixes(WINDOWS)
    assert len(prefixes) == runner.num_layers + 1 and torch.equal(prefixes[0], runner.embed(WINDOWS))
    for index, (before, after) in enumerate(zip(prefixes, prefixes[1:], strict=False)):
        assert torch.equal(after, runner.layer(index, before))


@each_architecture
def test_a_layer_is_its_sublayers_one_after_the_other_and_the_differentiable_one_is_the_same(changes):
    runner = LayerRunner.of(tiny_model(**changes), batch_tokens=24)
    before = runner.embed(WINDOWS)
    hidden = before
    for sublayer in runner.table.sublayers:
        hidden = runner.sublayer(2, sublayer, hidden)
    assert torch.equal(hidden, runner.layer(2, before))
    torch.testing.assert_close(runner.differentiable_layer(2, before).detach(), hidden)


def fails_at(monkeypatch, runner: LayerRunner, windows: int, error: Exception) -> list[int]:
    """A machine on which a layer can take fewer than so many windows at a time; counts what went through."""
    seen, after = [], LayerRunner._after

    def limited(self, layer, sublayer, hidden):
        if len(hidden) >= windows:
            raise error
        seen.append(len(hidden))
        return after(self, layer, sublayer, hidden)

    monkeypatch.setattr(LayerRunner, "_after", limited)
    return seen


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_where_memory_runs_out_half_as_many_windows_go_together_and_none_is_counted_twice(monkeypatch, caplog, error):
    runner, whole = (LayerRunner.of(tiny_model(), batch_tokens=36) for _ in range(2))
    expected, gates = whole.layers(whole.embed(WINDOWS)), gathered_gates(whole, WINDOWS)
    seen = fails_at(monkeypatch, runner, 2, error)
    torch.testing.assert_close(runner.layers(runner.embed(WINDOWS)), expected)
    assert set(seen) == {1} and runner.batch_tokens == 12 and caplog.text.count("memory ran out") == 1
    runner.batch_tokens = 36
    for got, wanted in zip(gathered_gates(runner, WINDOWS), gates, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("windows", "error"), [(1, torch.OutOfMemoryError("CUDA out of memory")), (2, RuntimeError("shapes do not match"))]
)
def test_one_window_too_many_and_other_errors_are_not_hidden(monkeypatch, windows, error):
    runner = LayerRunner.of(tiny_model(), batch_tokens=36)
    fails_at(monkeypatch, runner, windows, error)
    with pytest.raises(RuntimeError, match=str(error)):
        runner.layers(runner.embed(WINDOWS))


@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_a_removed_sublayer_changes_nothing_and_has_nothing_to_observe(name):
    model = tiny_model()
    runner = LayerRunner.of(model)
    sublayer, hidden = runner.table.sublayer(name), runner.embed(WINDOWS)
    slice_sublayer(model.model.layers[1], sublayer, (), geometry_of(model))
    assert runner.sublayer(1, sublayer, hidden, lambda *_: pytest.fail("nothing goes through")) is hidden


def test_an_eager_model_is_causal_too():
    model = tiny_model()
    expected = naive_losses(model, WINDOWS)
    model.set_attn_implementation("eager")
    runner = LayerRunner.of(model)
    torch.testing.assert_close(
        runner.head.losses(runner.layers(runner.embed(WINDOWS)), WINDOWS), expected, rtol=1e-5, atol=1e-5
    )


def test_a_range_of_layers_is_those_layers():
    runner = LayerRunner.of(tiny_model())
    hidden = runner.embed(WINDOWS)
    halfway = runner.layers(hidden, 0, 2)
    assert torch.equal(halfway, runner.layer(1, runner.layer(0, hidden)))
    assert torch.equal(runner.layers(halfway, 2), runner.layers(hidden))
    assert torch.equal(runner.layers(hidden, 4), hidden)


@pytest.mark.parametrize("batch_tokens", [1, 24, 36, 10**6])
def test_the_batch_size_changes_nothing(batch_tokens):
    model = tiny_model()
    whole, runner = LayerRunner.of(model), LayerRunner.of(model, batch_tokens=batch_tokens)
    expected = whole.layers(whole.embed(WINDOWS))
    hidden = runner.layers(runner.embed(WINDOWS))
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(runner.head.losses(hidden, WINDOWS), whole.head.losses(expected, WINDOWS), rtol=1e-5, atol=1e-5)
    for got, wanted in zip(gathered_gates(runner, WINDOWS), gathered_gates(whole, WINDOWS), strict=True):
        torch.testing.assert_close(got, wanted)


@each_architecture
def test_observers_see_every_input_of_the_output_projection(changes):
    model = tiny_model(**changes)
    layer, seen = model.model.layers[1], {"attention": [], "mlp": []}
    expected = {"attention": [], "mlp": []}
    for name, linear in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
        linear.register_forward_pre_hook(lambda _, args, name=name: expected[name].append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(WINDOWS)
    expected = {name: whole for name, (whole,) in expected.items()}
    runner = LayerRunner.of(tiny_model(**changes), batch_tokens=24)
    hidden = runner.layer(0, runner.embed(WINDOWS))
    for sublayer in runner.table.sublayers:
        rows = seen[sublayer.name]
        hidden = runner.sublayer(1, sublayer, hidden, lambda _, now, rows=rows: rows.append(now.inputs.flatten(0, -2)))
    for name, batches in seen.items():
        assert len(batches) == 3
        torch.testing.assert_close(torch.cat(batches), expected[name])


@each_architecture
@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_what_is_observed_is_what_the_output_projection_took_and_gave(changes, name):
    model = tiny_model(**changes)
    runner = LayerRunner.of(model)
    sublayer, batch = runner.table.sublayer(name), runner.embed(WINDOWS)
    seen = runner.observed(1, sublayer, batch)
    assert torch.equal(seen.after, runner.sublayer(1, sublayer, batch)) and not seen.after.requires_grad
    projection = getattr(getattr(model.model.layers[1], sublayer.attribute), sublayer.output.name)
    with torch.no_grad():
        torch.testing.assert_close(seen.outputs, projection(seen.inputs))
    torch.testing.assert_close(seen.after - batch, seen.outputs, rtol=1e-4, atol=1e-5)
    assert seen.inputs.shape == (*WINDOWS.shape, projection.in_features)


@each_architecture
@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_what_enters_the_output_projection_is_had_without_its_product(changes, name, monkeypatch):
    model = tiny_model(**changes)
    runner = LayerRunner.of(model)
    sublayer, batch = runner.table.sublayer(name), runner.embed(WINDOWS)
    expected, after = runner.observed(1, sublayer, batch).inputs, runner.sublayer(1, sublayer, batch)
    projection = getattr(getattr(model.model.layers[1], sublayer.attribute), sublayer.output.name)
    product, products = torch.nn.functional.linear, []

    def counted(inputs, weight, *others):
        products.append(weight is projection.weight)
        return product(inputs, weight, *others)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    assert torch.equal(runner.entering(1, sublayer, batch), expected)
    assert products and not any(products)
    assert torch.equal(runner.sublayer(1, sublayer, batch), after)  # and the projection is what it was


@each_architecture
def test_gate_gradients_equal_a_plain_backward_pass(changes):
    expected = naive_gates(tiny_model(**changes), WINDOWS)
    for got, wanted in zip(gathered_gates(LayerRunner.of(tiny_model(**changes)), WINDOWS), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@each_architecture
def test_summed_over_tokens_a_gate_gradient_is_weight_times_gradient_of_its_column(changes):
    model = tiny_model(**changes)
    naive_gates(model, WINDOWS)
    products = [
        [(linear.weight * linear.weight.grad).sum(0).detach() for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
        for layer in model.model.layers
    ]
    for gates, wanted in zip(gathered_gates(LayerRunner.of(model), WINDOWS), products, strict=True):
        for gate, product in zip(gates, wanted, strict=True):
            torch.testing.assert_close(gate.sum((0, 1)), product, rtol=1e-3, atol=1e-5)


def test_no_weight_gradient_is_formed_and_hooks_are_gone_afterwards():
    model = tiny_model()
    gathered_gates(LayerRunner.of(model), WINDOWS)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_hooks_are_gone_after_an_observer_raised():
    model = tiny_model()
    runner = LayerRunner.of(model)

    def fail(*_):
        raise KeyError("observer")

    with pytest.raises(KeyError):
        runner.sublayer(0, runner.table.mlp, runner.embed(WINDOWS), fail)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
