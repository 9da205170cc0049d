"""What share of the machine a pass through the model uses, and what the ways of scoring cost: ratios within one run.

    python benchmarks/speed.py --data_dir ../shared/data --output DIR

The machine's peak is its own product of two large matrices, in the same precision, with the same threads, between the measured
passes. Floating-point operations are counted by torch while the code runs. Everything is repeated in turns; the best counts,
for whatever else the machine does only takes time away.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script of the repository, not of an installed package

import torch
from torch.utils.flop_counter import FlopCounterMode

from LLMPruner import cli
from LLMPruner.config import require_at_least
from LLMPruner.data.corpora import check_corpus
from LLMPruner.data.windows import load_windows
from LLMPruner.evaluator.ppl import perplexity_of
from LLMPruner.files import check_output_folder, write_json, write_text
from LLMPruner.importance.criteria import gate_statistics
from LLMPruner.importance.layer_analyzer import removal
from LLMPruner.memory import peak_memory, reset_peak_memory
from LLMPruner.model.device import dtype_name
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import load_model
from LLMPruner.model.source import find_model

SIZE = 2048  # rows and columns of the matrices whose product is the machine's peak


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked; exits with 2 where they are wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--base_model", help="the model; default: the embedded SmolLM2-135M")
    parser.add_argument("--output", required=True, metavar="DIR", help="where results go: speed.json, speed.md")
    parser.add_argument("--data_dir", help="folder with local corpora")
    parser.add_argument("--windows", type=int, default=8, help="windows of a pass")
    parser.add_argument("--seq_len", type=int, default=512, help="tokens of a window")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--dtype", default="auto", help="precision")
    parser.add_argument("--device", default="auto", help="where to compute")
    return parser.parse_args(argv)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """The time of a call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def naive_removal(runner: LayerRunner, windows: torch.Tensor) -> None:
    """Layer scores without anything re-used: a whole forward pass for every layer that is skipped."""
    for skipped in range(runner.num_layers):
        hidden = runner.layers(runner.embed(windows), 0, skipped)
        runner.head.losses(runner.layers(hidden, skipped + 1), windows)


def weight_taylor(runner: LayerRunner, windows: torch.Tensor) -> None:
    """Taylor scores as LLM-Pruner takes them: gradients of all weights, window by window, |w dL/dw| summed a column."""
    model = runner.store.model
    model.requires_grad_(True)
    model.gradient_checkpointing_disable()
    for window in windows:
        batch = window.unsqueeze(0).to(runner.device)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    for layer in model.get_submodule(runner.table.layers):
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            (linear.weight * linear.weight.grad).abs().sum(0)
    model.zero_grad()
    model.requires_grad_(False)


def product(runner: LayerRunner) -> tuple[Callable[[], Any], int]:
    """The machine's own product, and its operations."""
    one, other = (torch.randn(SIZE, SIZE, device=runner.device, dtype=runner.store.model.dtype) for _ in range(2))
    return lambda: one @ other, 2 * SIZE**3


def counted(function: Callable[[], Any]) -> int:
    """Floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def measure(runner: LayerRunner, windows: torch.Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Best seconds, operations and extra peak bytes of everything."""
    few, multiply = windows[:2], product(runner)
    work: dict[str, Callable[[], Any]] = {
        "calibration forward": lambda: runner.layers(runner.embed(windows)),
        "PPL": lambda: perplexity_of(runner, windows),
        "layer importance, prefixes re-used": lambda: removal(runner, few),
        "layer importance, each anew": lambda: naive_removal(runner, few),
        "Taylor by gates": lambda: gate_statistics(runner, runner.store.geometry, few),
        "Taylor by weight gradients": lambda: weight_taylor(runner, few),
    }
    backward = 3 * counted(lambda: perplexity_of(runner, few))  # torch's counter does not follow gradients of inputs alone
    flops = {name: backward if name.startswith("Taylor") else counted(call) for name, call in work.items()}
    rows: dict[str, dict[str, float]] = {name: {"flops": count, "seconds": float("inf")} for name, count in flops.items()}
    rows["matrix product"] = {"flops": multiply[1], "seconds": float("inf")}
    for _ in range(repeats):
        for name, call in work.items():
            for _ in range(3):
                rows["matrix product"]["seconds"] = min(rows["matrix product"]["seconds"], seconds(multiply[0], runner.device))
            reset_peak_memory(str(runner.device))
            before = peak_memory(str(runner.device))
            rows[name]["seconds"] = min(rows[name]["seconds"], seconds(call, runner.device))
            rows[name]["extra_bytes"] = peak_memory(str(runner.device)) - before
    peak = multiply[1] / rows["matrix product"]["seconds"]
    for row in rows.values():
        row["share"] = row["flops"] / row["seconds"] / peak
    return rows


def table(rows: dict[str, dict[str, float]], where: str) -> str:
    """The rows as Markdown."""
    lines = [f"{where}", "", "| | TFLOP | seconds | share of the machine's product | extra peak GB |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        extra = f"{row['extra_bytes'] / 1e9:.2f}" if "extra_bytes" in row else ""
        lines.append(f"| {name} | {row['flops'] / 1e12:.3f} | {row['seconds']:.2f} | {row['share']:.0%} | {extra} |")
    return "\n".join(lines) + "\n"


def recipe(argv: Sequence[str]) -> None:
    """Parse, check, measure."""
    args = parse(argv)
    for name in ("windows", "seq_len", "repeats"):
        require_at_least(f"--{name}", getattr(args, name), 2 if name != "repeats" else 1)
    output = check_output_folder(args.output, "--output")
    source = find_model(args.base_model, "--base_model")
    check_corpus("wikitext2", args.data_dir, "train", args.seq_len)
    loaded = load_model(source, dtype=args.dtype, device=args.device)
    windows = load_windows(
        loaded.tokenizer, "wikitext2", "train", seq_len=args.seq_len, samples=args.windows, data_dir=args.data_dir, seed=0
    )
    rows = measure(loaded.runner, windows, args.repeats)
    threads = f", {torch.get_num_threads()} threads" if loaded.runner.device.type == "cpu" else ""
    where = f"{source.path.name}, {dtype_name(loaded.model.dtype)} on {loaded.runner.device}{threads}, {args.windows} windows "
    where += f"of {args.seq_len} tokens"
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "speed.json", {"where": where, "rows": rows})
    write_text(output / "speed.md", table(rows, where))
    print(table(rows, where), end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
