"""What the peers read: the dense model as a Hugging Face folder, and the windows of quality.py as one safetensors file.

Runs in the repository's own environment; the peers' scripts, in theirs, import nothing of this package.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script of the repository, not of an installed package

from safetensors.torch import save_file

from LLMPruner import cli
from LLMPruner.config import require_at_least
from LLMPruner.data.corpora import check_corpus
from LLMPruner.data.windows import load_windows
from LLMPruner.errors import UsageError
from LLMPruner.files import write_json
from LLMPruner.model.load import load_model
from LLMPruner.model.source import check_seq_len, find_model

CORPORA = ("wikitext2", "ptb", "news")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, named as in quality.py."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--data_dir", required=True, help="folder with wikitext-2-raw and ptb")
    parser.add_argument("--base_model", default="embedded")
    parser.add_argument("--calibrations", nargs="+", default=["wikitext2", "news"])
    parser.add_argument("--samples", type=int, default=32, help="calibration windows, drawn at random")
    parser.add_argument("--windows", type=int, default=32, help="test windows per corpus, spread evenly")
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, required=True, help="folder of model/ and windows.safetensors")
    return parser.parse_args(argv)


def save_model(model: Any, folder: Path) -> None:
    """A float32 folder that transformers 4.43 and 5.x read alike."""
    model.save_pretrained(folder)
    rope = model.config.rope_parameters
    if rope["rope_type"] != "default":
        raise UsageError(f"rope type {rope['rope_type']} is not written for transformers 4.43")
    path = folder / "config.json"
    # 4.43 looks for these at the top level and would silently take its own defaults
    older = {
        "rope_theta": rope["rope_theta"],
        "torch_dtype": "float32",
        "tie_word_embeddings": model.config.tie_word_embeddings,
    }
    write_json(path, {**json.loads(path.read_text()), **older})


def recipe(argv: Sequence[str]) -> None:
    """Write both."""
    args = parse(argv)
    for flag, least in (("seq_len", 2), ("windows", 0), ("samples", 1)):
        require_at_least(f"--{flag}", getattr(args, flag), least)
    source = find_model(args.base_model, "--base_model")
    check_seq_len(source, "--seq_len", args.seq_len)
    for name, split in (*((name, "train") for name in args.calibrations), *((name, "test") for name in CORPORA)):
        check_corpus(name, args.data_dir, split, args.seq_len)
    dense = load_model(source, dtype="float32")
    save_model(dense.model, args.output / "model")
    common = {"seq_len": args.seq_len, "data_dir": args.data_dir}
    windows = {}
    for name in args.calibrations:
        windows[f"calibration.{name}"] = load_windows(
            dense.tokenizer, name, "train", samples=args.samples, seed=args.seed, **common
        )
    for name in CORPORA:
        windows[f"test.{name}"] = load_windows(dense.tokenizer, name, "test", samples=args.windows, **common)
    # in the words of quality.json, so that a row never lands beside rows of other windows
    setting = {"model": args.base_model, "windows": args.windows, "seq_len": args.seq_len}
    windows = {name: rows.contiguous() for name, rows in windows.items()}
    save_file(windows, args.output / "windows.safetensors", metadata={"setting": json.dumps(setting), "seed": str(args.seed)})
    print(f"{args.output}: model and {', '.join(f'{name} {tuple(rows.shape)}' for name, rows in windows.items())}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
