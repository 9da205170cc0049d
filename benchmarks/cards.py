"""The forecast for Llama-3-8B and 70B on cards that are not here: memory resident and streamed, and seconds.

    python benchmarks/cards.py

Bytes follow from the sizes alone. Seconds are those of a card with the RATES below, an assumption about an H200 and no
measurement; on this machine `--dry_run` measures them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script of the repository, not of an installed package

from random_llama import COMMON, SHAPES

from LLMPruner import cli
from LLMPruner.config import PruneConfig
from LLMPruner.cost import Rates
from LLMPruner.importance.budget import make_budget
from LLMPruner.model.source import ModelSource
from LLMPruner.plan import Geometry, PruningPlan
from LLMPruner.stages.forecast import Forecast, Machine, forecast
from LLMPruner.stages.job import PruneJob

GB = 10**9
CARDS = (("8b", 80), ("8b", 24), ("8b", 8), ("70b", 24))
RATES = Rates(
    matmul=700e12,
    back=350e12,
    product=330e12,
    single=50e12,
    double=55e12,
    copy=4e12,
    to_device=25e9,
    read=3e9,
    write=0.5e9,
    call=8e-6,
)


def foreseen(shape: str, card: int, *, resident: bool, **settings: object) -> Forecast:
    """The forecast of the default preset with attention and MLP, bfloat16, on a card of so many GB in a machine of 128."""
    config = COMMON | SHAPES[shape]
    geometry = Geometry.from_config(config)
    source = ModelSource(Path(shape), "hf", geometry, PruningPlan.dense(geometry), config=config)
    job = PruneJob(source, PruneConfig(prune_mlp=True, **settings))
    machine = Machine(RATES, card * GB, 128 * GB, 500 * GB, 64 * GB)
    return forecast(job, make_budget(geometry, job.prune), machine, itemsize=2, device="cuda", resident=resident)


def recipe(argv: Sequence[str]) -> None:
    """Print a Markdown table, and the stages of 8B."""
    cli.Parser(__doc__).parse_args(argv)
    lines = [
        "| model | card GB | weights | device GB | host GB | disk GB | minutes | fits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape, card in CARDS:
        for resident in (True, False):
            found = foreseen(shape, card, resident=resident)
            peaks = (getattr(found.peak(kind), kind) / GB for kind in ("device", "host", "disk"))
            cells = [shape, card, "in memory" if resident else "on disk", *(f"{peak:.1f}" for peak in peaks)]
            fits = "no" if found.missing() else "yes"
            lines.append("| " + " | ".join(map(str, [*cells, f"{found.total / 60:.1f}", fits])) + " |")
    print("\n".join(lines))
    for resident in (True, False):
        print(f"\n8b, 80 GB, weights {'in memory' if resident else 'on disk'}\n{foreseen('8b', 80, resident=resident).table()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
