"""Say whether a model is healthy: its weights, its shapes against the plan, its GQA ratio, and what it generates."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from LLMPruner import cli
from LLMPruner.checkpoint import write_text
from LLMPruner.model import find_model


def build_parser() -> argparse.ArgumentParser:
    """All flags of the diagnosis."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model_path", required=True, help="a .bin of these scripts, a Hugging Face directory, or 'embedded'")
    parser.add_argument("--test_forward", action=cli.Switch, default=False, help="also run the model and generate a few tokens")
    parser.add_argument("--save_report", metavar="FILE", help="write the report too; as JSON where FILE ends in .json")
    cli.add_run_flags(parser)
    return parser


def recipe(argv: Sequence[str]) -> int:
    """Parse, check, diagnose; returns 0 for a healthy model, 1 for an unhealthy one."""
    args = build_parser().parse_args(argv)
    if args.save_report is not None:
        cli.check_output_file(args.save_report, "--save_report")
    source = find_model(args.model_path, "--model_path")

    from LLMPruner.evaluator.health import diagnose_forward, diagnose_weights, report_text
    from LLMPruner.model import load_model

    diagnosis = diagnose_weights(source)
    if args.test_forward and diagnosis.healthy:  # broken weights say enough, and may not even load
        loaded = load_model(source, dtype=args.dtype, device=args.device)
        diagnosis = replace(diagnosis, findings=(*diagnosis.findings, *diagnose_forward(loaded)))
    report = report_text(diagnosis)
    print(report, end="")
    if args.save_report is not None:
        as_json = Path(args.save_report).suffix == ".json"
        write_text(Path(args.save_report), json.dumps(diagnosis.as_dict(), indent=2) + "\n" if as_json else report)
    return 0 if diagnosis.healthy else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
