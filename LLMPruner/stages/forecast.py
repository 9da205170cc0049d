"""What a run will cost: seconds, FLOPs and bytes of every stage, before a weight is read, and how right that was.

The costs of the stages come from `costs`; here they become seconds and bytes of a machine, a table, and advice where something
does not fit. On a CPU the device's memory is main memory.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner import parallel
from LLMPruner.cost import Cost, Rates, Setup
from LLMPruner.importance.budget import Budget
from LLMPruner.memory import available_memory
from LLMPruner.model import size
from LLMPruner.model.fit import hidden_limit
from LLMPruner.model.source import weight_files
from LLMPruner.stages import costs

if TYPE_CHECKING:
    from LLMPruner.run import Run
    from LLMPruner.stages.job import PruneJob

logger = logging.getLogger("LLMPruner")


@dataclass(frozen=True)
class Machine:
    """What there is to compute with: rates, and free bytes of the device, of main memory (a CPU's is both) and of the disk.
    `limit`: bytes of hidden states that a streamed model keeps in main memory."""

    rates: Rates
    device: int
    host: int
    disk: int
    limit: int


@dataclass(frozen=True)
class Row:
    """A stage as it is forecast: FLOPs, seconds, and bytes at its peak."""

    stage: str
    flops: int
    seconds: float
    device: int
    host: int
    disk: int


@dataclass(frozen=True)
class Forecast:
    """All stages of a job on a machine."""

    setup: Setup
    costs: tuple[Cost, ...]
    machine: Machine

    @property
    def rows(self) -> list[Row]:
        """One of each stage, in order."""
        rows, left = [], 0
        for cost in self.costs:
            device, host = device_bytes(self.setup, cost), host_bytes(self.setup, cost, self.machine.limit)
            spilt = 0 if self.setup.resident else max(0, cost.hidden - self.machine.limit)
            rows.append(
                Row(cost.stage, cost.work.flops, self.seconds(cost), device, host, left + spilt + cost.temporary + cost.left)
            )
            left += cost.left + cost.temporary
        return rows

    def seconds(self, cost: Cost) -> float:
        """Of a stage. What is read of a streamed model is read while it computes."""
        rates, setup, reads = self.machine.rates, self.setup, 0.0
        work = cost.work.seconds(rates)
        if not setup.resident:
            params = setup.layer_params(pruned=cost.pruned) * setup.geometry.num_layers * cost.passes
            params += cost.head * setup.geometry.vocab_size * setup.geometry.hidden_size
            reads = params * (setup.itemsize if cost.pruned else setup.stored) / rates.read
            work += params * setup.itemsize / rates.to_device
            if not setup.cpu:  # hidden states go to the device and back at every layer
                work += 2 * cost.hidden * cost.passes * setup.geometry.num_layers / rates.to_device
        seconds = max(work, reads) + cost.read / rates.read + cost.written / rates.write
        return min(seconds, cost.most) + cost.waits

    def peak(self, kind: str) -> Row:
        """The stage that needs most of the device, the host or the disk."""
        return max(self.rows, key=lambda row: getattr(row, kind))

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(row.seconds for row in self.rows)

    @property
    def memories(self) -> tuple[str, ...]:
        """The kinds of memory that the machine has."""
        return ("host",) if self.setup.cpu else ("device", "host")

    @property
    def lacks_memory(self) -> bool:
        """Whether a memory of any process is too small."""
        return any(getattr(self.peak(kind), kind) > parallel.least(getattr(self.machine, kind)) for kind in self.memories)

    def missing(self, unstreamable: str | None = None) -> list[str]:
        """What does not fit, a sentence each; `unstreamable` names what of the job needs all weights in memory."""
        found, names = [], {"device": "device memory", "host": "main memory", "disk": "disk"}
        for kind in (*self.memories, "disk"):
            row, free = self.peak(kind), getattr(self.machine, kind)
            if getattr(row, kind) > free:
                needed = f"{getattr(row, kind) / 1e9:.1f} GB of {names[kind]}, {free / 1e9:.1f} GB are free"
                found.append(f"stage {row.stage} needs {needed}: {self._advice(kind, row, unstreamable)}")
        return found

    def _advice(self, kind: str, row: Row, unstreamable: str | None) -> str:
        """What may help where a stage lacks memory or disk."""
        if kind == "disk":
            return "free some space, or use --no_save_model or fewer formats to export"
        cost = next(cost for cost in self.costs if cost.stage == row.stage)
        if cost.learning and getattr(row, kind) - cost.learning < getattr(self.machine, kind):
            return "let fewer layers learn at once: lower --distill_last, or --distill_model_epochs and --distill_epochs"
        if self.setup.resident and unstreamable:
            return f"{unstreamable} needs all weights at once, without it --stream on leaves them on disk"
        if self.setup.resident:
            return "use --stream on, which leaves the weights on disk"
        samples = {"plan": "--channel_importance_samples", "layer importance": "--layer_importance_samples"}
        fewer = next((flag for name, flag in samples.items() if row.stage == name), "--repair_samples")
        if row.stage.startswith("evaluate"):
            fewer = "--eval_samples"
        on_host = kind == "host" and cost.hidden > getattr(row, kind) // 4
        return f"lower --hidden_gb or {fewer}" if on_host else f"use fewer samples ({fewer}) or shorter windows"

    def table(self) -> str:
        """The forecast as lines: a stage each, then totals and peaks, and what is free."""
        device = not self.setup.cpu
        head = ["stage", "TFLOP", "seconds", *(["device GB"] if device else []), "host GB", "disk GB"]

        def line(name: str, flops: int, seconds: float, *sizes: int) -> list[str]:
            return [name, f"{flops / 1e12:,.2f}", f"{seconds:,.1f}", *(f"{value / 1e9:.2f}" for value in sizes[not device :])]

        lines = [line(row.stage, row.flops, row.seconds, row.device, row.host, row.disk) for row in self.rows]
        peaks = [getattr(self.peak(kind), kind) for kind in ("device", "host", "disk")]
        lines.append(line("total, peak", sum(row.flops for row in self.rows), self.total, *peaks))
        free = [self.machine.device, self.machine.host, self.machine.disk][not device :]
        lines.append(["free", "", "", *(f"{value / 1e9:.2f}" for value in free)])
        return aligned([head, *lines])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the metrics."""
        rows = [asdict(row) | {"seconds": round(row.seconds, 2)} for row in self.rows]
        return {"resident": self.setup.resident, "stages": rows, "rates": asdict(self.machine.rates)}


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first one to the left and the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def device_bytes(setup: Setup, cost: Cost) -> int:
    """Bytes on the device at the stage's peak; where weights are read, of a layer and maybe the head beside it."""
    if setup.resident:
        return setup.weights(pruned=cost.pruned) + cost.device + cost.hidden
    if not cost.passes:
        return 0
    return cost.layers * setup.layer_bytes(pruned=cost.pruned) + cost.head * setup.head_bytes + cost.device


def host_bytes(setup: Setup, cost: Cost, limit: int) -> int:
    """Bytes of main memory at the stage's peak, of a streamed model with the layer that is read meanwhile."""
    host = size.LIBRARIES + cost.host + (device_bytes(setup, cost) if setup.cpu else 0)
    if not setup.resident and cost.passes:
        host += setup.layer_bytes(pruned=cost.pruned) + min(cost.hidden, limit)
    return host


def forecast(job: PruneJob, budget: Budget, machine: Machine, *, itemsize: int, device: str, resident: bool) -> Forecast:
    """Of all stages of `job` on a machine; `device` is cpu, cuda or mps, `itemsize` the bytes of a weight there."""
    setup = costs.setup_of(job, budget, itemsize, device, resident=resident)
    return Forecast(setup, costs.stages(job, budget, setup), machine)


def foresee(job: PruneJob, budget: Budget, folder: Path) -> Forecast:
    """The forecast for this machine, measured now: resident where `--stream` and the memory there is allow it."""
    from LLMPruner.model.device import resolve_device, resolve_dtype
    from LLMPruner.model.rates import measure_rates

    place = resolve_device(job.common.device)
    dtype, free = resolve_dtype(job.common.dtype, place), available_memory("cpu")
    file = next(iter(weight_files(job.source)), None) if job.source.repo is None and not job.dry_run else None
    rates = measure_rates(place, dtype, job.source.geometry.hidden_size, file)
    disk = shutil.disk_usage(next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())).free
    machine = Machine(rates, available_memory(str(place)), free, disk, hidden_limit(job.common, free))
    settings = {"itemsize": dtype.itemsize, "device": place.type}
    found = forecast(job, budget, machine, **settings, resident=job.common.stream != "on")
    if job.common.stream == "auto" and not job.unstreamable and found.lacks_memory:
        return forecast(job, budget, machine, **settings, resident=False)
    return found


def dry_run(job: PruneJob, run: Run, budget: Budget) -> Forecast:
    """Log what would be removed and what it would cost; no weight is read."""
    job = job.sized()
    log_budget(job, budget)
    params = budget.geometry.dense_params - budget.target
    logger.info(
        "keeps about %s of %s parameters (a plan in whole units removes a little more)",
        f"{params:,}",
        f"{budget.geometry.dense_params:,}",
    )
    log_size(params)
    found = foresee(job, budget, run.dir)
    log_forecast(found, job)
    return found


def log_size(params: int) -> None:
    """Log how large so many parameters are."""
    logger.info("predicted size: %.1f MB at 2 bytes a parameter, %.1f MB at 4", params * 2 / 1e6, params * 4 / 1e6)


def log_budget(job: PruneJob, budget: Budget) -> None:
    """Log what is to be removed of what."""
    logger.info(
        "budget: remove %s of the %s's %s parameters (ratio %s)",
        f"{budget.target:,}",
        budget.base_name,
        f"{budget.base:,}",
        job.prune.pruning_ratio,
    )


def log_forecast(found: Forecast, job: PruneJob) -> None:
    """Log the table, and what does not fit."""
    rates, how = found.machine.rates, "weights in memory" if found.setup.resident else "weights read layer by layer"
    logger.info("forecast (%s; %.3g TFLOP/s, disk %.1f GB/s)\n%s", how, rates.matmul / 1e12, rates.read / 1e9, found.table())
    missing = found.missing(job.unstreamable)
    for sentence in missing:
        logger.warning("forecast: %s", sentence)
    if not missing:
        logger.info("forecast: it fits")


def log_comparison(found: Forecast, run: Run) -> None:
    """Log forecast and measured seconds and peak memory of each stage that ran."""
    rows, kind = [("stage", "forecast s", "measured s", "forecast GB", "measured GB")], "host" if found.setup.cpu else "device"
    expected, setup = {row.stage: row for row in found.rows}, found.setup
    mapped = 0 if setup.resident or not setup.cpu else setup.geometry.dense_params * setup.stored  # pages of files count, too
    for record in run.stages:
        row = expected.get(record["stage"])
        if row is not None:
            sizes = f"{(getattr(row, kind) + mapped) / 1e9:.2f}", f"{record['peak_memory_gb']:.2f}"
            rows.append((row.stage, f"{row.seconds:,.1f}", f"{record['seconds']:,.1f}", *sizes))
    logger.info("forecast and measured (memory of the %s)\n%s", "process" if found.setup.cpu else "device", aligned(rows))
