"""Kills, a memory limit and a full disk, for real: what a run leaves, and whether `--resume` ends as an undisturbed one.

    python benchmarks/bad_weather.py --data_dir ../shared/data --kills 20

A Llama of random weights goes through the pruning script. Killed (SIGKILL) at random moments and resumed, until
it ends: its weights must be those of a run that nobody disturbed, bit by bit, and nothing half-written may lie there.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script of the repository, not of an installed package

from random_llama import small, write_model

from LLMPruner import cli
from LLMPruner.config import require_at_least
from LLMPruner.data.corpora import check_corpus
from LLMPruner.errors import RunError
from LLMPruner.model.checkpoint import load_checkpoint

SCRIPT = Path(__file__).resolve().parent.parent / "llama3_unbalanced_pruning_gqa_aware.py"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked; exits with 2 where they are wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--data_dir", help="folder with local corpora")
    parser.add_argument("--kills", type=int, default=20, help="how often the process is killed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--stream", choices=("on", "off"), default="off", help="where the weights are")
    return parser.parse_args(argv)


def command(args: argparse.Namespace, name: str, *flags: str) -> list[str]:
    """The pruning script on the model `dense`, small enough for a minute."""
    sizes = ["--layer_importance_samples=8", "--channel_importance_samples=16", "--calibration_seq_len=128", "--prune_mlp"]
    sizes += ["--base_model=dense", f"--save_ckpt_log_name={name}", f"--stream={args.stream}", "--test_after_prune"]
    data = [] if args.data_dir is None else [f"--data_dir={Path(args.data_dir).resolve()}"]
    return [sys.executable, str(SCRIPT), *sizes, "--eval_samples=8", *data, *flags]


def ended(process: subprocess.Popen, seconds: float) -> int | None:
    """The exit code of a process within so many seconds; None where it was killed."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return None


def check_whole(folder: Path) -> None:
    """Raise RunError where a file that has a name is not whole."""
    for path in folder.glob("**/*.json"):
        if not path.name.startswith("."):
            json.loads(path.read_text(encoding="utf-8"))
    for path in folder.glob("*.bin"):
        load_checkpoint(path)


def kills(args: argparse.Namespace, folder: Path) -> tuple[int, int]:
    """Kill and resume until `args.kills` are done; returns how many struck a run, and how many runs ended before theirs."""
    rng, struck, missed = random.Random(args.seed), 0, 0
    start = time.monotonic()
    if subprocess.run(command(args, "whole"), cwd=folder, capture_output=True).returncode:
        raise RunError("the undisturbed run failed")
    whole = time.monotonic() - start
    wanted = load_checkpoint(folder / "prune_log/whole/pytorch_model.bin")[0]
    name = "struck0"
    while struck < args.kills:
        place = folder / "prune_log" / name
        resumed = ["--resume"] if (place / "journal.json").is_file() else []
        process = subprocess.Popen(
            command(args, name, *resumed), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        code = ended(process, rng.uniform(0.2, 1.0) * whole)
        check_whole(place)
        if code is None:
            struck += 1
            continue
        if code:
            raise RunError(f"after {struck} kills a run ended with {code}: {process.stderr.read()}")
        compare(place, wanted)
        missed += 1
        name = f"struck{missed}"
    if (folder / "prune_log" / name / "journal.json").is_file():
        last = subprocess.run(command(args, name, "--resume"), cwd=folder, capture_output=True, text=True)
        if last.returncode:
            raise RunError(f"the last run ended with {last.returncode}: {last.stderr}")
        compare(folder / "prune_log" / name, wanted)
    return struck, missed + 1


def compare(place: Path, wanted: dict) -> None:
    """Raise RunError unless the model there is the undisturbed run's, with nothing beside it that should be gone."""
    found = load_checkpoint(place / "pytorch_model.bin")[0]
    if list(found) != list(wanted) or not all(value.equal(wanted[name]) for name, value in found.items()):
        raise RunError(f"{place} is not what an undisturbed run gives")
    left = [path.name for path in place.iterdir() if path.name.startswith(".") or path.name == "work"]
    if left:
        raise RunError(f"{place} still has {', '.join(left)}")


def limited(args: argparse.Namespace, folder: Path, what: str, amount: int) -> str:
    """The script under a limit (`ulimit` in KiB: v memory, f size of a file); returns its one sentence."""
    shell = f'ulimit -{what} {amount} && exec "$@"'
    ran = subprocess.run(
        ["bash", "-c", shell, "-", *command(args, f"limited_{what}")], cwd=folder, capture_output=True, text=True
    )
    sentences = [line for line in ran.stderr.splitlines() if line.startswith("error:")]
    if ran.returncode != 1 or len(sentences) != 1 or "Traceback" in ran.stderr:
        raise RunError(f"under ulimit -{what} {amount}: exit code {ran.returncode}, {ran.stderr[-800:]}")
    check_whole(folder / "prune_log" / f"limited_{what}")
    return sentences[0]


def recipe(argv: Sequence[str]) -> None:
    """Parse, check, try everything."""
    args = parse(argv)
    require_at_least("--kills", args.kills, 1)
    check_corpus("wikitext2", args.data_dir, "train", 128)
    with tempfile.TemporaryDirectory(prefix="weather.") as name:
        folder = Path(name)
        write_model(folder / "dense", small(8, 256))
        struck, runs = kills(args, folder)
        print(f"{struck} kills, {runs} runs ended as the undisturbed one, nothing half-written")
        write_model(folder / "dense", small(2, 4096))
        print("memory:", limited(args, folder, "v", 2_500_000))  # less than a layer's statistics, streamed too
        write_model(folder / "dense", small(2, 1024))
        print("disk:", limited(args, folder, "f", 20_000))  # less than a layer


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
