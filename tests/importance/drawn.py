"""Geometries and pruning requests as hypothesis draws them, and the plans that answer them."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from hypothesis import assume
from hypothesis import strategies as st

from LLMPruner.config import PruneConfig
from LLMPruner.errors import UsageError
from LLMPruner.importance.allocation import STRATEGIES, allocate, keep_best_units
from LLMPruner.importance.budget import default_round_to, make_budget
from LLMPruner.importance.criteria import UnitScores
from LLMPruner.plan import Geometry, PruningPlan

LLAMA_3_8B = Geometry(128256, 4096, 14336, 32, 32, 8, 128)
SMOLLM2 = Geometry(49152, 576, 1536, 30, 9, 3, 64, tied_embeddings=True)
TINY = Geometry(300, 64, 96, 4, 8, 2, 8)


@st.composite
def geometries(draw) -> Geometry:
    kv_heads = draw(st.integers(1, 8))
    return Geometry(
        vocab_size=draw(st.integers(1, 500)),
        hidden_size=draw(st.integers(1, 64)),
        intermediate_size=draw(st.integers(2, 200)),
        num_layers=draw(st.integers(1, 8)),
        num_heads=kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 16)),
        tied_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


@st.composite
def requests(draw, **fixed) -> tuple[Geometry, PruneConfig, list[float]]:
    """A geometry, a pruning request for it (feasible or not), and layer scores."""
    geometry = draw(geometries())
    attention = draw(st.booleans())
    mlp = True if not attention else draw(st.booleans())
    start = draw(st.integers(0, geometry.num_layers - 1))
    low, high = sorted((draw(st.just(0.0) | st.floats(0, 0.5)), draw(st.just(1.0) | st.floats(0.01, 1))))
    settings = {
        "pruning_ratio": draw(st.floats(0.001, 0.95)),
        "prune_attention": attention,
        "prune_mlp": mlp,
        "ratio_base": draw(st.sampled_from(["auto", "model", "selected"])),
        "round_to": draw(st.none() | st.integers(1, 64)),
        "layer_start": start,
        "layer_end": draw(st.none() | st.integers(start + 1, geometry.num_layers)),
        "pruning_strategy": draw(st.sampled_from(sorted(set(STRATEGIES) - {"search"}))),
        "layer_importance_weight": draw(st.sampled_from([0.0, 0.3, 1.0, 3.0, 500.0])),
        "min_pruning_rate": low,
        "max_pruning_rate": high,
        "freeze_top_n_layers": draw(st.integers(0, 2)),
    }
    scores = draw(
        st.lists(
            st.floats(1e-9, 1e3) | st.sampled_from([-1.0, 0.0, 1.0]),
            min_size=geometry.num_layers,
            max_size=geometry.num_layers,
        )
    )
    return geometry, PruneConfig(**settings | fixed), scores


def planned(geometry: Geometry, config: PruneConfig, scores: list[float]) -> tuple[PruningPlan, int]:
    """The plan of a request and its target, the units scored at random."""
    budget = make_budget(geometry, config)
    generator = torch.Generator().manual_seed(0)
    units = [
        UnitScores(
            torch.rand(geometry.num_kv_heads, generator=generator), torch.rand(geometry.intermediate_size, generator=generator)
        )
        for _ in range(geometry.num_layers)
    ]
    return keep_best_units(geometry, allocate(budget, scores, config, units), units), budget.target


def named_ratio(error: UsageError) -> float:
    found = re.search(r"largest feasible ratio here is ([\d.e-]+)", str(error))
    assume(found is not None)
    return float(found.group(1))


def feasible(geometry: Geometry, config: PruneConfig, scores: list[float]) -> tuple[PruningPlan, int]:
    """The plan of the request, or of the ratio that its refusal names."""
    for _ in range(3):
        try:
            return planned(geometry, config, scores)
        except UsageError as error:
            config = replace(config, pruning_ratio=named_ratio(error))
    raise AssertionError("a named ratio is refused again and again")


def step_of(geometry: Geometry, config: PruneConfig) -> int:
    return config.round_to or default_round_to(geometry)


def one_step(geometry: Geometry, config: PruneConfig) -> int:
    """Parameters of one rounding step of one layer; one KV group when only attention is pruned."""
    return step_of(geometry, config) * geometry.unit_params("mlp") if config.prune_mlp else geometry.unit_params("attention")
