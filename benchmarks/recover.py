"""A campaign from dense to recovered, in one command that can be killed and repeated: prune, recover in several ways, compare.

    python benchmarks/recover.py --output DIR [--base_model PATH] [--data_dir DIR] [--dataset wikitext2:0.3 news:0.3 self:0.4]

Every way sees as many tokens: all weights or LoRA with the dense model as teacher on --dataset, or LoRA on --corpus alone (the
document's way). Repeated with the same --output, only what is missing is done, so more ways can be added to a campaign.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script of the repository, not of an installed package

from LLMPruner import cli
from LLMPruner.config import CommonConfig
from LLMPruner.data.corpora import check_corpus
from LLMPruner.data.mixture import SELF, check_mixture, windows_by_part
from LLMPruner.errors import RunError, UsageError
from LLMPruner.files import check_output_folder, existing_path, read_json_file, write_atomically, write_json
from LLMPruner.stages.teaching import SELF_TEXT
from LLMPruner.training_config import FinetuneConfig

ROOT = Path(__file__).resolve().parent.parent
WAYS = {  # flags of test_finetuning.py; who has a teacher reads --dataset, the others --corpus
    "full_taught": ["--lr", "3e-4", "--distill"],
    "lora_taught": ["--use_lora", "--distill"],
    "lora": ["--use_lora"],
}
PRUNED = Path("prune_log/pruned")
PRUNE = "llama3_unbalanced_pruning_gqa_aware.py"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked; exits with 2 where they are wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="where prune_log and results.json go")
    parser.add_argument("--base_model", default="embedded", help="the dense model")
    parser.add_argument("--data_dir", help="folder with local corpora")
    parser.add_argument("--pruning_ratio", type=float, default=0.25, help="fraction of the parameters to remove")
    parser.add_argument("--preset", default=None, help="preset of the pruning; default: none")
    parser.add_argument("--corpus", default="wikitext2", help="text to calibrate on, and of --ways lora")
    parser.add_argument(
        "--dataset",
        nargs="+",
        metavar="NAME[:WEIGHT]",
        help="text to learn on from the teacher; default: --corpus and self",
    )
    parser.add_argument("--eval_datasets", nargs="+", default=["wikitext2"], help="text to report on")
    parser.add_argument("--eval_samples", type=int, default=0, help="windows of it; 0: all")
    parser.add_argument("--samples", type=int, default=200, help="training windows")
    parser.add_argument("--epochs", type=int, default=1, help="passes over them")
    parser.add_argument("--seq_len", type=int, default=512, help="tokens of a window")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["full_taught"], help="ways to recover")
    parser.add_argument("--seed", type=int, default=42, help="seed of every random choice")
    parser.add_argument("--device", default="auto", help="where to compute")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags of the pruning script, at the end")
    return parser.parse_args(argv)


def local(path: str) -> str:
    """A path, with a weight or without one, as it is called from the output folder; a name stays one."""
    place, colon, weight = path.rpartition(":")
    if colon and Path(place).exists() and not Path(path).exists():
        return f"{Path(place).resolve()}:{weight}"
    return str(Path(path).resolve()) if Path(path).exists() else path


def same_campaign(args: argparse.Namespace) -> None:
    """Write down what the campaign is. Raises UsageError where the folder has another one, whose figures would be taken, and
    where a new one cannot be."""
    asked = {name: value for name, value in vars(args).items() if name not in ("output", "ways")}
    path = args.output / "campaign.json"
    if path.is_file():
        before = read_json_file(path, "--output: the campaign")
        for name in asked:
            if before.get(name) != asked[name]:
                was = f"was {before.get(name)!r}, is {asked[name]!r}"
                raise UsageError(f"--output {args.output} has a campaign whose --{name} {was}: choose another folder")
    else:
        check_pruning(args)
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(path, asked)


def check_text(args: argparse.Namespace) -> dict[str, int]:
    """All that can be said of the text before an hour is spent: windows of each part of --dataset. Raises UsageError."""
    check_corpus(args.corpus, args.data_dir, "train", args.seq_len)
    config = FinetuneConfig(samples=args.samples, epochs=args.epochs, seq_len=args.seq_len, dataset=tuple(args.dataset))
    check_mixture(config, CommonConfig(data_dir=args.data_dir))
    for corpus in args.eval_datasets:
        check_corpus(corpus, args.data_dir, "test", args.seq_len)
    return windows_by_part(config)


def pruning(args: argparse.Namespace) -> list[str]:
    """The pruning script's flags."""
    flags = ["--base_model", args.base_model, "--save_ckpt_log_name", PRUNED.name, "--prune_mlp", "--save_model"]
    flags += ["--pruning_ratio", str(args.pruning_ratio), "--calibration_dataset", args.corpus]
    flags += [] if args.preset is None else ["--preset", args.preset]
    return [*flags, *args.flags]


def check_pruning(args: argparse.Namespace) -> None:
    """Foresee the pruning, which says what it will take. Raises UsageError where it can't be, before there is a campaign."""
    with TemporaryDirectory() as nowhere:
        if run(nowhere, PRUNE, *pruning(args), *shared(args), "--dry_run"):
            raise UsageError(f"{PRUNE} refuses this campaign: correct what it says above; nothing was changed")


def once(args: argparse.Namespace, folder: Path, journal: str, script: str, *flags: str) -> None:
    """Run a script unless its journal below `folder` says that it is finished; go on where it stopped. Raises RunError."""
    place = args.output / folder / journal
    if place.is_file():
        if "finished" in read_json_file(place, str(place))["done"]:
            return
        flags = (*flags, "--resume")
    call(args, script, *flags, *shared(args))


def shared(args: argparse.Namespace) -> list[str]:
    """Flags of both scripts that change a model."""
    flags = ["--seed", str(args.seed), "--device", args.device]
    return flags + ([] if args.data_dir is None else ["--data_dir", args.data_dir])


def share_text(folder: Path, way: str) -> None:
    """Let a way read what the dense model wrote for another one; a text that is not the one it asks for is written anew."""
    own, other = folder / way / SELF_TEXT, next(folder.glob(f"*/{SELF_TEXT}"), None)
    if other is not None and not own.exists():
        own.parent.mkdir(exist_ok=True)
        write_atomically(own, lambda place: shutil.copyfile(other, place))


def call(args: argparse.Namespace, script: str, *flags: str) -> None:
    """Run a script of the suite in the output folder. Raises RunError where it fails."""
    code = run(args.output, script, *flags)
    if code:
        raise RunError(f"{script} ended with {code}: repeat the same command to go on")


def run(folder: str | Path, script: str, *flags: str) -> int:
    """The exit code of a script of the suite, run in `folder`."""
    return subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=folder, check=False).returncode


def recipe(argv: Sequence[str]) -> None:
    """Prune, recover, compare, print."""
    args = parse(argv)
    args.base_model, args.corpus = local(args.base_model), local(args.corpus)
    args.eval_datasets = [local(name) for name in args.eval_datasets]
    args.dataset = [local(entry) for entry in args.dataset or (f"{args.corpus}:0.5", f"{SELF}:0.5")]
    args.output = check_output_folder(args.output, "--output")
    if args.data_dir is not None:
        args.data_dir = str(existing_path(args.data_dir, "--data_dir").resolve())
    text = check_text(args)
    same_campaign(args)
    once(args, PRUNED, "journal.json", PRUNE, *pruning(args))
    models = [f"dense={args.base_model}", f"pruned={PRUNED / 'pytorch_model.bin'}"]
    for way in args.ways:
        flags = [*WAYS[way], "--model_path", str(PRUNED / "pytorch_model.bin"), "--save_name", way]
        flags += ["--samples", str(args.samples), "--epochs", str(args.epochs), "--seq_len", str(args.seq_len)]
        flags += ["--dataset", *(args.dataset if "--distill" in flags else [args.corpus])]
        if "--distill" in flags and SELF in text:
            share_text(args.output / PRUNED.parent, way)
        once(args, PRUNED.parent / way, "journal_finetune.json", "test_finetuning.py", *flags)
        models.append(f"{way}={PRUNED.parent / way / 'pytorch_model_finetuned.bin'}")
    compare = ["--models", *models, "--baseline", "dense"]
    compare += ["--seq_len", str(args.seq_len), "--eval_datasets", *args.eval_datasets]
    compare += ["--eval_samples", str(args.eval_samples), "--save_results", "results.json", "--table_lang", "en"]
    compare += ["--resume"] if (args.output / "results.json").is_file() else []
    compare += [] if args.data_dir is None else ["--data_dir", args.data_dir]
    call(args, "evaluate_models.py", *compare, "--device", args.device)
    print(json.dumps({way: seconds(args, way) for way in args.ways}))


def seconds(args: argparse.Namespace, way: str) -> float | None:
    """Of a way's training, as its metrics say; None where it was cut off, for they know what came after alone."""
    metrics = read_json_file(args.output / PRUNED.parent / way / "metrics.json", way)
    if metrics["training"].get("resumed_at") is not None:
        return None
    return sum(stage["seconds"] for stage in metrics["stages"] if stage["stage"] in ("teach", "train"))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
