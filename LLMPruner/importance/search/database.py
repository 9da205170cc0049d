"""Every sublayer at every level, healed, within a bound of memory that the search can afford."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from LLMPruner.families.slicing import output_columns, output_projection, slice_sublayer
from LLMPruner.importance.budget import Prunable
from LLMPruner.importance.criteria import UnitScores
from LLMPruner.methods.gqa_aware import select_units
from LLMPruner.methods.repair import solve_own
from LLMPruner.plan import Geometry

if TYPE_CHECKING:
    import torch

    from LLMPruner.model.forward import LayerRunner


class Database:
    """Every sublayer at every level, healed: kept units as a ranking, weights solved when they are asked for.

    Memory: a ranking and a Gram matrix in float16 a sublayer (0.16 GB in all for SmolLM2-135M, 14 GB for Llama-3-8B, where
    the healed weights of all levels would be ten times that), and the output weights of two plans, those asked for last (7 GB
    for Llama-3-8B at 25%). It knows no budget: every pruning ratio may share it.
    """

    def __init__(self, runner: LayerRunner, geometry: Geometry, sublayers: Sequence[Prunable], *, heals: bool = True) -> None:
        self.runner, self.geometry, self.sublayers = runner, geometry, tuple(sublayers)
        self.scores: list[UnitScores] = []
        self._heals = heals
        self._grams: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []
        self._variants: OrderedDict[tuple[int, int], tuple[tuple[int, ...], torch.Tensor | None]] = OrderedDict()

    def add_layer(self, scores: UnitScores, grams: dict[str, torch.Tensor]) -> None:
        """Append the next layer's scores and the Gram matrices of its sublayers, by kind."""
        self.scores.append(scores)
        self._grams.append({kind: _packed(gram) for kind, gram in grams.items()})

    def variant(self, which: int, level: int) -> tuple[tuple[int, ...], torch.Tensor | None]:
        """The units that sublayer `which` keeps at `level`, and its healed output weights (None: none kept)."""
        key = (which, level)
        if key not in self._variants:
            sublayer = self.sublayers[which]
            kept = select_units(self.scores[sublayer.layer].of(sublayer.kind).tolist(), sublayer.levels[level])
            self._variants[key] = kept, self._heal(sublayer, kept) if kept else None
            if len(self._variants) > 2 * len(self.sublayers):
                self._variants.popitem(last=False)
        self._variants.move_to_end(key)
        return self._variants[key]

    def _heal(self, sublayer: Prunable, kept: tuple[int, ...]) -> torch.Tensor:
        """Output weights of the kept columns, `(hidden, kept)`, fitted to the dense model's activations."""
        part = self.geometry.table.sublayer(sublayer.kind)
        with self.runner.store.layer(sublayer.layer) as layer:
            weight = output_projection(layer, part).weight.detach()
            columns = output_columns(part, kept, self.geometry).to(weight.device)
            if not self._heals:
                return weight[:, columns]
            gram = _unpacked(self._grams[sublayer.layer][sublayer.kind]).to(weight.device)
            return solve_own(weight.float(), gram, columns).to(weight.dtype)

    @contextlib.contextmanager
    def replaced(self, levels: Sequence[int], start: int = 0) -> Iterator[None]:
        """The model with every sublayer from layer `start` on at its level of `levels`; dense again afterwards."""
        with contextlib.ExitStack() as stack:
            for which, level in enumerate(levels):
                if level and self.sublayers[which].layer >= start:
                    stack.enter_context(self._replaced(which, level))
            yield

    @contextlib.contextmanager
    def _replaced(self, which: int, level: int) -> Iterator[None]:
        sublayer = self.sublayers[which]
        part = self.geometry.table.sublayer(sublayer.kind)
        kept, healed = self.variant(which, level)  # solved while the dense weights are in place
        with self.runner.store.layer(sublayer.layer) as layer:
            dense = getattr(layer, part.attribute)
            children, units = dict(dense.named_children()), getattr(dense, part.states_units or "", None)
            try:
                slice_sublayer(layer, part, kept, self.geometry)
                if kept:
                    output_projection(layer, part).weight.data = healed
                yield
            finally:
                setattr(layer, part.attribute, dense)
                for name, child in children.items():
                    setattr(dense, name, child)
                if part.states_units is not None:
                    setattr(dense, part.states_units, units)


def _packed(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gram matrix in half the memory: correlations in float16 and the scales in float32."""
    scale = gram.diagonal().clamp_min(0).sqrt().clamp_min(1e-20)
    return (gram / scale / scale.unsqueeze(1)).half().cpu(), scale.cpu()


def _unpacked(packed: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    correlations, scale = packed
    return correlations.float() * scale * scale.unsqueeze(1)
