"""What a repair may know of a sublayer, gathered on the dense model's stream of hidden states and on the pruned one's."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from LLMPruner.families.family import Sublayer
from LLMPruner.families.slicing import output_columns, output_projection
from LLMPruner.methods.moments import Moments, relative_to, token_scales
from LLMPruner.methods.repair import Evidence, Repair
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.hidden import fetch
from LLMPruner.plan import PruningPlan


@dataclass
class Streams:
    """This process's calibration windows: hidden states `(n, seq_len, hidden)` in the dense and in the pruned model, and
    which tokens `(n, seq_len)` are held out."""

    dense: torch.Tensor
    pruned: torch.Tensor
    held_out: torch.Tensor


def gather_evidence(
    runner: LayerRunner, sublayer: Sublayer, index: int, plan: PruningPlan, method: Repair, streams: Streams
) -> tuple[Evidence, torch.Tensor, torch.Tensor]:
    """What a repair may know of a dense sublayer, the dense stream after it, and what of the pruned one enters the output
    projection, in the columns that are kept. Gathered batch by batch.

    The target is what the projection itself gave on the dense stream, not the difference of the stream after and before: where
    the stream is 64 times as long as what is added to it, a third of that difference is bfloat16's rounding.
    """
    columns = output_columns(sublayer, plan.layers[index].kept(sublayer.name), plan.geometry).to(runner.device)
    dense, pruned, held = streams.dense, streams.pruned, streams.held_out.to(runner.device)
    answer, entering = runner.home.empty_like(dense), runner.home.empty((*dense.shape[:2], len(columns)), dense.dtype)
    with runner.store.layer(index) as layer:
        projection = output_projection(layer, sublayer)
        chosen = columns if method.solves and len(columns) < projection.in_features else None
        fit, held_out = (Moments(gram=method.solves, kept=chosen) for _ in range(2))
        bias = 0 if projection.bias is None else projection.bias.float()

        def look(part: slice) -> tuple[torch.Tensor, ...]:
            before = fetch(dense, part, runner.device)
            theirs = runner.observed(index, sublayer, before)
            now, inputs, drift = before, theirs.inputs, 0
            if pruned is not dense:
                now = fetch(pruned, part, runner.device)
                inputs = runner.entering(index, sublayer, now)
                if not sublayer.wraps:  # else what is added to the stream is not what the projection gives
                    drift = before.float() - now.float()
            if not method.solves:
                return theirs.after, inputs, inputs, None
            own, scales = theirs.outputs.float() - bias, token_scales(before, now, theirs.after)
            targets = torch.cat([own, own + drift], -1)  # (windows, seq_len, 2 * hidden)
            return theirs.after, inputs, relative_to(scales, inputs), relative_to(scales, targets)

        for part, (after, arriving, inputs, targets) in runner.computed(*dense.shape[:2], look):
            answer[part], entering[part], out = after, arriving[..., columns], held[part].flatten()
            for moments, tokens in ((fit, ~out), (held_out, out)):
                wanted = None if targets is None else targets.flatten(0, 1)[tokens]
                moments.add(inputs.flatten(0, 1)[tokens], targets=wanted)
            del after, arriving, inputs, targets
        return Evidence(projection.weight.detach(), columns, fit.pool(), held_out.pool()), answer, entering


def entering_kept(runner: LayerRunner, sublayer: Sublayer, index: int, plan: PruningPlan, hidden: torch.Tensor) -> torch.Tensor:
    """What enters the output projection of a dense sublayer in the columns that are kept, `(n, seq_len, k)`."""
    columns = output_columns(sublayer, plan.layers[index].kept(sublayer.name), plan.geometry).to(runner.device)

    def look(part: slice) -> torch.Tensor:
        return runner.entering(index, sublayer, fetch(hidden, part, runner.device))[..., columns]

    return runner.filled(runner.home.empty((*hidden.shape[:2], len(columns)), hidden.dtype), look)
