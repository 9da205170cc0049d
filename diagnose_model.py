"""Say whether a model is healthy: its weights, its shapes against the plan, its GQA ratio, and what it generates."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from LLMPruner import cli
from LLMPruner.errors import DamagedError, UsageError
from LLMPruner.files import check_output_file, write_json, write_text
from LLMPruner.model.source import find_model

if TYPE_CHECKING:
    from LLMPruner.evaluator.health import Diagnosis
    from LLMPruner.plan import Geometry


def build_parser() -> argparse.ArgumentParser:
    """All flags of the diagnosis."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model_path", required=True, help="a .bin of these scripts, a Hugging Face directory, or 'embedded'")
    parser.add_argument("--test_forward", action=cli.Switch, default=False, help="also run the model and generate a few tokens")
    parser.add_argument("--original_model", help="the dense model: also look for tokens that pruning made far too long")
    parser.add_argument("--save_report", metavar="FILE", help="write the report too; as JSON where FILE ends in .json")
    cli.add_common_flags(parser)
    return parser


def diagnose(args: argparse.Namespace) -> Diagnosis:
    """Find and examine the model. Raises UsageError where there is none: a file that is there and damaged is a diagnosis."""
    settings = cli.common_config(args)
    try:
        source = find_model(args.model_path, "--model_path", faulty=True)  # what is wrong with its weights is what is asked
    except DamagedError as error:
        from LLMPruner.evaluator.health import unreadable

        return unreadable(args.model_path, error)
    original = None if args.original_model is None else find_model(args.original_model, "--original_model")
    if original is not None and comparable(original.geometry) != comparable(source.geometry):
        raise UsageError(f"--original_model {args.original_model} is not the dense model of {source.path}: its sizes differ")
    from LLMPruner.evaluator.health import diagnose_weights, with_forward, with_original

    diagnosis = diagnose_weights(source)
    if args.test_forward:
        diagnosis = with_forward(diagnosis, source, settings)
    return diagnosis if original is None else with_original(diagnosis, source, original, settings)


def comparable(geometry: Geometry) -> tuple[int, ...]:
    """The sizes that a model shares with what was pruned from it, whatever the format."""
    return geometry.num_layers, geometry.hidden_size, geometry.vocab_size


def recipe(argv: Sequence[str]) -> int:
    """Parse, check, diagnose; returns 0 for a healthy model, 1 for an unhealthy one."""
    args = build_parser().parse_args(argv)
    if args.save_report is not None:
        check_output_file(args.save_report, "--save_report")
    diagnosis = diagnose(args)

    from LLMPruner.evaluator.report import report_text

    report = report_text(diagnosis)
    print(report, end="")
    if args.save_report is not None:
        path = Path(args.save_report)
        if path.suffix == ".json":
            write_json(path, diagnosis.as_dict())
        else:
            write_text(path, report)
    return 0 if diagnosis.healthy else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
