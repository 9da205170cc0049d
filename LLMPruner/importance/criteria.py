"""What is unimportant: a score per KV group and per MLP channel of every layer, float32, the larger the more needed.

A criterion is one function from a sublayer and its statistics to one score per unit, and one entry in CRITERIA that says
which statistics it `needs`. The same function scores KV groups and channels: both are columns of an output projection
(o_proj, down_proj) with the rows that feed them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from LLMPruner import parallel
from LLMPruner.cost import Cost, Setup, Work
from LLMPruner.errors import RunError
from LLMPruner.families.family import Sublayer
from LLMPruner.methods.gqa_aware import group_scores
from LLMPruner.methods.obs import removal_costs
from LLMPruner.plan import Geometry

if TYPE_CHECKING:  # the command line reads CRITERIA and must not wait for torch
    import torch
    from torch import nn

    from LLMPruner.methods.moments import Moments
    from LLMPruner.model.forward import LayerRunner, Observed


@dataclass(frozen=True)
class UnitScores:
    """Scores of one layer: `kv_groups` `(kv_heads,)` and `channels` `(intermediate,)`, float32 on the CPU."""

    kv_groups: torch.Tensor
    channels: torch.Tensor

    def of(self, kind: str) -> torch.Tensor:
        """The scores of the attention's or the MLP's units."""
        return self.kv_groups if kind == "attention" else self.channels


@dataclass(frozen=True)
class SublayerStatistics:
    """What calibration tells of one sublayer: moments of its output projection's inputs, and per unit the mean squared
    gradient of its gate `(units,)`. None where no criterion asked."""

    moments: Moments | None = None
    gates: torch.Tensor | None = None


LayerStatistics = tuple[SublayerStatistics, SublayerStatistics]  # of the attention and of the MLP


@dataclass(frozen=True)
class SublayerView:
    """A sublayer as the criteria see it: units that own rows of some projections and columns of the output projection."""

    units: int
    output: torch.Tensor | None  # (hidden, columns): weight of o_proj or down_proj; None where no criterion asked
    rows: tuple[torch.Tensor, ...]  # (units * rows of a unit, hidden) each: q, k and v, or gate and up
    statistics: SublayerStatistics
    seed: int

    def per_unit(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a value per row or column `(units * n,)` into one per unit `(units,)`: a unit's ones are adjacent."""
        return group_scores(values, self.units)


@dataclass(frozen=True)
class Criterion:
    """A scoring function, the statistics it reads (gates, moments, gram), and how its scores compare across sublayers.

    `scale`: loss, where they estimate the rise of the loss; standard, where they are deviations from the sublayer's mean; own.
    `weights`: whether it reads weights; where they are on disk, those that nobody reads stay there.
    """

    score: Callable[[SublayerView], torch.Tensor]
    needs: str | None = None
    scale: str = "own"
    weights: bool = True


def taylor(view: SublayerView) -> torch.Tensor:
    """Fisher-Taylor: the mean squared gradient of the unit's gate, taken per token.

    Second-order effect on the loss of removing the unit, up to a constant (Molchanov et al. 2019; Kwon et al. 2022).
    """
    return view.statistics.gates


def obs(view: SublayerView) -> torch.Tensor:
    """Optimal Brain Surgeon: the rise of the sublayer's output error when the unit goes and all kept ones are refitted.

    (Hassibi & Stork 1992; ZipLM, Kurtic et al. 2023; OSSCAR, Meng et al. 2024.)
    """
    return removal_costs(view.output, view.statistics.moments.gram, view.output.shape[1] // view.units)


def flap(view: SublayerView) -> torch.Tensor:
    """Weighted input variance, standardized over the columns of the sublayer (FLAP, An et al. 2024).

    What a unit adds on average a bias can replace; only what fluctuates is lost: Var(x_j) |W_j|^2. As in the authors' code
    attention columns are squared before, and a KV group is the mean of its columns' deviations: the mean of many varies
    less than one channel's, so few groups rank below the channels.
    """
    fluctuation = view.statistics.moments.variance * view.output.float().square().sum(0)  # (columns,)
    if len(fluctuation) > view.units:  # attention
        fluctuation = fluctuation.square()
    standard = (fluctuation - fluctuation.mean()) / fluctuation.std(correction=0).clamp_min(1e-30)
    return standard.view(view.units, -1).mean(1)


def wanda(view: SublayerView) -> torch.Tensor:
    """Structured Wanda (Sun et al. 2024; Wanda-sp in An et al. 2024): |W_ij| |x_j| summed over the unit's columns."""
    return view.per_unit(view.output.float().abs().sum(0) * view.statistics.moments.mean_square.sqrt())


def magnitude(view: SublayerView) -> torch.Tensor:
    """Squared L2 norm of all weights of the unit (Li et al. 2017)."""
    total = view.per_unit(view.output.float().square().sum(0))
    return sum((view.per_unit(weight.float().square().sum(1)) for weight in view.rows), total)


def random(view: SublayerView) -> torch.Tensor:
    """Uniform noise, the control: anything worth using must beat it."""
    import torch

    return torch.rand(view.units, generator=torch.Generator().manual_seed(view.seed))


CRITERIA: dict[str, Criterion] = {
    "taylor": Criterion(taylor, needs="gates", scale="loss", weights=False),
    "obs": Criterion(obs, needs="gram"),
    "flap": Criterion(flap, needs="moments", scale="standard"),
    "wanda": Criterion(wanda, needs="moments"),
    "magnitude": Criterion(magnitude),
    "random": Criterion(random, weights=False),
}


def score_units(
    runner: LayerRunner, geometry: Geometry, importance: str, *, windows: torch.Tensor, seed: int
) -> list[UnitScores]:
    """Score every layer's units by the named criterion; `windows` `(n, seq_len)` feed those that need statistics."""
    criterion = CRITERIA[importance]
    return [
        score_layer(criterion, runner, index, statistics, seed + 2 * index)
        for index, statistics in enumerate(gather_statistics(runner, geometry, windows, {criterion.needs}))
    ]


def score_layer(criterion: Criterion, runner: LayerRunner, index: int, statistics: LayerStatistics, seed: int) -> UnitScores:
    """The scores of the units of dense layer `index`."""
    scores = []
    geometry = runner.store.geometry
    with runner.store.layer(index) if criterion.weights else nullcontext() as layer:
        for place, (sublayer, gathered) in enumerate(zip(geometry.table.sublayers, statistics, strict=True)):
            score = criterion.score(sublayer_view(sublayer, layer, geometry, gathered, seed + place)).float().cpu()
            if not score.isfinite().all():
                name = sublayer.name
                raise RunError(f"the {name} scores are not finite: run diagnose_model.py on the model, or try --dtype float32")
            scores.append(score)
    return UnitScores(*scores)


def sublayer_view(
    sublayer: Sublayer, layer: nn.Module | None, geometry: Geometry, statistics: SublayerStatistics, seed: int = 0
) -> SublayerView:
    """One sublayer of a dense decoder layer, as the criteria see it; without a layer there are no weights to be seen."""
    if layer is None:
        return SublayerView(geometry.units(sublayer.name), None, (), statistics, seed)
    module = getattr(layer, sublayer.attribute)
    *rows, output = (getattr(module, part.name).weight.detach() for part in sublayer.projections)
    return SublayerView(geometry.units(sublayer.name), output, tuple(rows), statistics, seed)


def gather_statistics(
    runner: LayerRunner, geometry: Geometry, windows: torch.Tensor, needs: Collection[str | None]
) -> Iterator[LayerStatistics]:
    """The statistics that `needs` names (gates, moments, gram), layer by layer over `windows` `(n, seq_len)`.

    Moments are streamed: one layer's Gram matrices are alive at a time. Gate gradients come from the last layer to the
    first, so their sums, one number a unit, are all kept.
    """
    nothing = (None, None)
    gates = gate_statistics(runner, geometry, windows) if "gates" in needs else [nothing] * runner.num_layers
    if {"moments", "gram"} & set(needs):
        moments = _moments(runner, windows, gram="gram" in needs)
    else:
        moments = iter([nothing] * runner.num_layers)
    for (groups, channels), (attention, mlp) in zip(gates, moments, strict=True):
        yield SublayerStatistics(attention, groups), SublayerStatistics(mlp, channels)


def _moments(runner: LayerRunner, windows: torch.Tensor, *, gram: bool) -> Iterator[tuple[Moments, Moments]]:
    """The moments of every layer's o_proj and down_proj inputs."""
    from LLMPruner.methods.moments import Moments

    hidden = runner.embed(parallel.mine(windows))
    for index in range(runner.num_layers):
        attention, mlp = gathered = Moments(gram=gram), Moments(gram=gram)
        for sublayer, moments in zip(runner.table.sublayers, gathered, strict=True):
            hidden = _add_moments(runner, index, sublayer, hidden, moments, weighted=gram)
            moments.pool()
        yield attention, mlp


def _add_moments(
    runner: LayerRunner, index: int, sublayer: Sublayer, hidden: torch.Tensor, moments: Moments, *, weighted: bool
) -> torch.Tensor:
    """Add a sublayer's inputs on `hidden`, `weighted` by the size of the token as the repair's are; returns what comes after.

    Only second moments, which are solved with, are weighted: means and mean squares are those of the published criteria.
    """
    from LLMPruner.methods.moments import relative_to, token_scales

    def add(before: torch.Tensor, seen: Observed) -> None:
        inputs = relative_to(token_scales(before, seen.after), seen.inputs) if weighted else seen.inputs
        moments.add(inputs.flatten(0, 1))

    return runner.sublayer(index, sublayer, hidden, add)


def gate_statistics(runner: LayerRunner, geometry: Geometry, windows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every layer's mean squared gate gradients, float32 `(kv_heads,)` and `(intermediate,)`, in one pass over `windows`."""
    import torch

    units = [geometry.units(sublayer.name) for sublayer in geometry.table.sublayers]
    sums = [tuple(torch.zeros(count) for count in units) for _ in range(runner.num_layers)]

    def visit(index: int, gates: tuple[torch.Tensor, ...]) -> None:
        for total, count, gate in zip(sums[index], units, gates, strict=True):
            per_unit = gate.unflatten(-1, (count, -1)).sum(-1)  # (batch, seq_len, units)
            total += per_unit.square().sum((0, 1)).cpu()

    runner.gate_gradients(windows, visit)
    tokens = windows.numel()
    return [tuple(parallel.summed(total) / tokens for total in layer) for layer in sums]


def cost(setup: Setup, importance: str, windows: int, seq_len: int) -> Cost:
    """What scoring the units costs: gate gradients take a forward and a way back, moments a forward and their products."""
    needs, layers, tokens = CRITERIA[importance].needs, setup.geometry.num_layers, setup.mine(windows) * seq_len
    together, batch = setup.together(setup.mine(windows), seq_len), setup.batch(windows, seq_len)
    columns, hidden = setup.columns(pruned=False), setup.geometry.hidden_size
    if needs is None:
        return Cost("plan", Work(traffic=setup.weights()), 6 * setup.layer_params(), passes=int(CRITERIA[importance].weights))
    if needs == "gates":
        gates = Work(traffic=24 * tokens * sum(columns), calls=20 * -(-tokens // batch))
        work = setup.forward(tokens, seq_len) + (setup.backward(tokens, seq_len) + gates) * layers
        work += setup.head_work(tokens, gradient=True)
        device = max(setup.activations(batch, gradient=True), setup.logits(batch, gradient=True))
        return Cost("plan", work, device, setup.hidden(together, layers + 2), passes=2, head=True)
    work = setup.forward(tokens, seq_len) + Work(traffic=layers * tokens * sum(columns) * 3 * setup.itemsize)
    device = max(setup.activations(batch), setup.observed(batch))
    if needs == "gram":  # of both sublayers; OBS factors, inverts and updates in float64
        work += Work(product=2 * layers * tokens * sum(width**2 for width in columns))
        work += Work(double=layers * sum(width**3 + 2 * width**2 * (width + hidden) for width in columns))
        solved = 8 * max(columns) * (3 * max(columns) + hidden) if importance == "obs" else 0
        device = 4 * sum(width**2 for width in columns) + max(device, solved)
    return Cost("plan", work, device, setup.hidden(setup.mine(windows) * seq_len, 3), passes=1)
