"""How time and memory grow with layers, width and calibration text, resident and streamed; or one model of a given shape.

Llamas of random weights go through the pruning script, each in a process of its own:

    python benchmarks/scale.py --data_dir ../shared/data --output DIR             the growth: a table, JSON and a plot
    python benchmarks/scale.py --data_dir ../shared/data --output DIR --shape 8b  one model, streamed, killed once and resumed

Times are the processor's where it computes (a machine that others use stretches the wall's), peaks those of the process's own
allocations: what is mapped from files can be dropped at any time and does not count. Runs that are compared follow each other.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script of the repository, not of an installed package

from random_llama import SHAPES, read_metrics, small, write_model

from LLMPruner import cli
from LLMPruner.data.corpora import check_corpus
from LLMPruner.errors import RunError, UsageError
from LLMPruner.files import check_output_folder, read_json_file, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "llama3_unbalanced_pruning_gqa_aware.py"
WINDOWS = 16
AXES: dict[str, tuple[tuple[int, int, int], ...]] = {  # layers, width, calibration windows
    "layers": tuple((layers, 512, WINDOWS) for layers in (4, 8, 16, 32)),
    "width": tuple((4, width, WINDOWS) for width in (512, 1024, 2048, 4096)),
    "tokens": tuple((8, 512, windows) for windows in (WINDOWS, 2 * WINDOWS, 4 * WINDOWS)),
}
PLACE = {"layers": 0, "width": 1, "tokens": 2}
STAGES = {"layer importance": "layers", "plan": "units", "apply (repair least_squares)": "repair", "save": "save"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked; exits with 2 where they are wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="where results go: scale.json, scale.md, scale.png")
    parser.add_argument("--data_dir", help="folder with local corpora")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="what grows")
    parser.add_argument("--shape", choices=SHAPES, help="one model of this shape instead, streamed, killed once and resumed")
    parser.add_argument("--model", metavar="DIR", help="the model of --shape, where it is on disk already; else it is made")
    parser.add_argument("--kill_after", type=int, default=16, help="finished layers after which the process is killed")
    parser.add_argument("--device", default="auto", help="where to compute")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags of the pruning script, at the end")
    return parser.parse_args(argv)


class Memory(threading.Thread):
    """The largest amount that a process held of its own, bytes; what is mapped from files does not count."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.status, self.peak, self.over = Path(f"/proc/{process}/status"), 0, threading.Event()
        self.start()

    def run(self) -> None:
        """Look twenty times a second."""
        while not self.over.wait(0.05):
            try:
                text = self.status.read_text()
            except OSError:
                return
            for line in text.splitlines():
                if line.startswith("RssAnon:"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024)


def run(command: Sequence[str], folder: Path, until: Callable[[], bool] | None = None) -> tuple[int, float, int]:
    """Exit code, seconds, and peak of a command in `folder`; killed as soon as `until` says so."""
    start = time.monotonic()
    with open(folder / "output.txt", "ab") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        memory = Memory(process.pid)
        while process.poll() is None:
            if until is not None and until():
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.05)
    memory.over.set()
    return process.returncode, time.monotonic() - start, memory.peak


def command(args: argparse.Namespace, model: Path, name: str, *flags: str) -> list[str]:
    """The pruning script on `model`, with the flags of all measurements."""
    common = ["--calibration_seq_len=256", "--layer_importance_seq_len=128", "--layer_importance_samples=16", "--prune_mlp"]
    common += [f"--base_model={model.resolve()}", f"--save_ckpt_log_name={name}", f"--device={args.device}", *flags]
    common += [] if args.data_dir is None else [f"--data_dir={Path(args.data_dir).resolve()}"]
    return [sys.executable, str(SCRIPT), *common, *args.flags]


def point(args: argparse.Namespace, folder: Path, layers: int, width: int, windows: int, stream: str) -> dict[str, Any]:
    """One model through the script: seconds of each stage, and peaks."""
    model = folder / f"llama-{layers}-{width}"
    if not model.exists():
        write_model(model, small(layers, width))
    name = f"{layers}-{width}-{windows}-{stream}"
    flags = [f"--channel_importance_samples={windows}", f"--stream={stream}"]
    flags += ["--hidden_gb=0"] if stream == "on" else []  # they grow with the layers that are left out in turn
    code, seconds, peak = run(command(args, model, name, *flags), folder)
    if code:
        raise RunError(f"{name} failed with exit code {code}: {(folder / 'output.txt').read_text()[-500:]}")
    stages = {row["stage"]: row for row in read_metrics(folder / "prune_log" / name)["stages"]}
    row = {"layers": layers, "width": width, "windows": windows, "stream": stream, "wall": seconds, "peak_bytes": peak}
    row |= {f"{short}_seconds": stages[stage]["cpu_seconds"] for stage, short in STAGES.items()}
    row["seconds"] = sum(row[f"{short}_seconds"] for short in STAGES.values())
    print(f"{name}: {row['seconds']:.1f} s, {peak / 1e9:.2f} GB", flush=True)
    return row


def exponent(rows: Sequence[dict[str, Any]], axis: str, what: str) -> float:
    """By which power `what` grows along the axis: the slope of a line through the logarithms."""
    key = {"tokens": "windows"}.get(axis, axis)
    x, y = ([math.log(max(row[name], 1e-9)) for row in rows] for name in (key, what))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - middle_x) ** 2 for a in x)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / spread


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Every point, and the exponents."""
    head = ["grows", "layers", "width", "windows", "weights", *STAGES.values(), "seconds", "peak GB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for axis, rows in results.items():
        for stream in ("off", "on"):
            own = [row for row in rows if row["stream"] == stream]
            for row in own:
                cells = [axis, row["layers"], row["width"], row["windows"], "streamed" if stream == "on" else "resident"]
                cells += [f"{row[f'{short}_seconds']:.2f}" for short in STAGES.values()]
                lines.append(
                    "| " + " | ".join(map(str, [*cells, f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}"])) + " |"
                )
            powers = [exponent(own, axis, f"{short}_seconds") for short in STAGES.values()]
            powers += [exponent(own, axis, "seconds"), exponent(own, axis, "peak_bytes")]
            lines.append(f"| {axis} | | | | exponent | " + " | ".join(f"{power:.2f}" for power in powers) + " |")
    return "\n".join(lines) + "\n"


def plot(path: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    """Seconds over each axis, on logarithmic scales, and peaks, from zero on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    figure, axes = pyplot.subplots(2, len(results), figsize=(4 * len(results), 6), squeeze=False, layout="constrained")
    for column, (axis, rows) in enumerate(results.items()):
        key = {"tokens": "windows"}.get(axis, axis)
        for panel, what, label in zip(axes[:, column], ("seconds", "peak_bytes"), ("seconds", "peak GB"), strict=True):
            for stream, name in (("off", "resident"), ("on", "streamed")):
                own = [row for row in rows if row["stream"] == stream]
                values = [row[what] / (1e9 if what == "peak_bytes" else 1) for row in own]
                panel.plot([row[key] for row in own], values, marker="o", label=name)
            panel.set(xscale="log", xlabel=key if key == axis else f"{axis} ({key})", ylabel=label)
            if what == "seconds":
                panel.set_yscale("log")
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter("{x:g}")
            else:
                panel.set_ylim(bottom=0)
            panel.set_xticks([row[key] for row in own], [str(row[key]) for row in own], minor=False)
            panel.minorticks_off()
            panel.grid(alpha=0.3, which="both")
            panel.legend()
    figure.savefig(path, dpi=150)


def growth(args: argparse.Namespace, output: Path) -> None:
    """All points along all axes; those that are in the JSON already are not measured again."""
    path = output / "scale.json"
    results = read_json_file(path, "--output") if path.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="scale.") as name:
        for axis in args.axes:
            rows = results.setdefault(axis, [])
            known = {(row["layers"], row["width"], row["windows"], row["stream"]) for row in rows}
            for sizes in AXES[axis]:
                for stream in ("off", "on"):
                    if (*sizes, stream) not in known:
                        rows.append(point(args, Path(name), *sizes, stream))
                        write_json(path, results)
    write_text(output / "scale.md", table(results))
    plot(output / "scale.png", results)
    print(table(results), end="")


def one(args: argparse.Namespace, output: Path) -> None:
    """One model of a given shape, streamed, killed in the middle of its repair, and resumed."""
    with tempfile.TemporaryDirectory(prefix="scale.", dir=output) as name:
        folder = Path(name)
        model = Path(args.model) if args.model else folder / args.shape
        if not (model / "config.json").is_file():
            write_model(model, SHAPES[args.shape])
        index = folder / "prune_log" / args.shape / "work" / "layers.json"
        half = lambda: index.is_file() and index.read_text().count("state") >= args.kill_after  # noqa: E731
        asked = command(args, model, args.shape, "--stream=on", "--pruning_strategy=uniform")
        code, first, peak = run(asked, folder, half)
        if code != -signal.SIGKILL:
            raise RunError(f"the run ended with {code} before it was killed: {(folder / 'output.txt').read_text()[-500:]}")
        code, second, later = run([*asked, "--resume"], folder)
        if code:
            raise RunError(f"the resumed run failed with {code}: {(folder / 'output.txt').read_text()[-500:]}")
        record = {"seconds_until_killed": first, "seconds_resumed": second, "peak_bytes": max(peak, later), "command": asked}
        record |= {"metrics": read_metrics(folder / "prune_log" / args.shape)}
        record["model_bytes"] = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        write_json(output / f"scale_{args.shape}.json", record)
        print((folder / "output.txt").read_text(), end="")
    print(f"killed after {first:.0f} s, resumed in {second:.0f} s, peak of its own {max(peak, later) / 1e9:.2f} GB", flush=True)


def recipe(argv: Sequence[str]) -> None:
    """Parse, check, measure."""
    args = parse(argv)
    output = check_output_folder(args.output, "--output")
    check_corpus("wikitext2", args.data_dir, "train", 256)
    if args.model is not None and not args.shape:
        raise UsageError("--model is the model of a --shape: give both")
    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    (one if args.shape else growth)(args, output)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
