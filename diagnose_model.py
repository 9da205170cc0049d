"""Say whether a model is healthy: its weights, its shapes against the plan, its GQA ratio, and what it generates."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from LLMPruner import cli
from LLMPruner.data.corpora import check_corpus, local_file
from LLMPruner.errors import DamagedError, UsageError
from LLMPruner.evaluator.damage import DiagnosisConfig
from LLMPruner.files import check_output_file, existing_path, write_json, write_text
from LLMPruner.model.source import check_seq_len, files_at, find_model

if TYPE_CHECKING:
    from LLMPruner.evaluator.health import Diagnosis
    from LLMPruner.plan import Geometry


def build_parser() -> argparse.ArgumentParser:
    """All flags of the diagnosis."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model_path", required=True, help="a .bin of these scripts, a Hugging Face directory, or 'embedded'")
    parser.add_argument("--test_forward", action=cli.Switch, default=False, help="also run the model and generate a few tokens")
    parser.add_argument("--original_model", help="the dense model: also tell, layer by layer, how far the model is from it")
    parser.add_argument("--save_report", metavar="FILE", help="write the report too; as JSON where FILE ends in .json")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the comparison with --original_model")
    cli.add_settings(parser, DiagnosisConfig, "text of the comparison with --original_model")
    cli.add_common_flags(parser)
    return parser


def outputs(args: argparse.Namespace) -> dict[str, Path]:
    """What is to be written, by flag. Raises UsageError where it cannot be, or is one of the files that are read."""
    given = {f"--{name}": getattr(args, name) for name in ("model_path", "original_model")}
    taken = {flag: files_at(existing_path(path, flag)) for flag, path in given.items() if path is not None}
    if args.dataset is not None and (text := local_file(args.dataset, args.data_dir, "test")):
        taken["--dataset"] = [text]
    if args.plot is not None and Path(args.plot).suffix.lower() != ".png":
        raise UsageError(f"--plot {args.plot} must end in .png")
    places: dict[str, Path] = {}
    for name in ("save_report", "plot"):
        if getattr(args, name) is not None:
            places[name] = check_output_file(getattr(args, name), f"--{name}", taken)
            taken[f"--{name}"] = [places[name]]
    return places


def diagnosis_config(args: argparse.Namespace) -> DiagnosisConfig:
    """The text of the comparison. Raises UsageError for a corpus that cannot be read, or where nothing is compared."""
    config = DiagnosisConfig(**cli.settings_of(DiagnosisConfig, args))
    for flag in ("dataset", "plot"):
        if getattr(args, flag) is not None and args.original_model is None:
            raise UsageError(f"--{flag} belongs to the comparison with the dense model: give --original_model too")
    if config.dataset is not None:
        check_corpus(config.dataset, args.data_dir, "test", config.seq_len, args.text_format)
    return config


def diagnose(args: argparse.Namespace) -> Diagnosis:
    """Find and examine the model. Raises UsageError where there is none: a file that is there and damaged is a diagnosis."""
    settings, text = cli.common_config(args), diagnosis_config(args)
    try:
        source = find_model(args.model_path, "--model_path", faulty=True)  # what is wrong with its weights is what is asked
    except DamagedError as error:
        from LLMPruner.evaluator.health import unreadable

        return unreadable(args.model_path, error)
    original = None if args.original_model is None else find_model(args.original_model, "--original_model")
    if original is not None and original.is_pruned:
        raise UsageError(f"--original_model {args.original_model} is pruned itself: give the dense model it came from")
    if original is not None and comparable(original.geometry) != comparable(source.geometry):
        raise UsageError(f"--original_model {args.original_model} is not the dense model of {source.path}: its sizes differ")
    for model in () if original is None or text.dataset is None else (original, source):
        check_seq_len(model, "--seq_len", text.seq_len)
    from LLMPruner.evaluator.health import diagnose_weights, with_forward

    diagnosis = diagnose_weights(source)
    if args.test_forward:
        diagnosis = with_forward(diagnosis, source, settings)
    if original is None:
        return diagnosis
    from LLMPruner.evaluator.streams import with_original

    return with_original(diagnosis, source, original, settings, text)


def comparable(geometry: Geometry) -> tuple[int, ...]:
    """The sizes that a model shares with what was pruned from it, whatever the format."""
    return geometry.num_layers, geometry.hidden_size, geometry.vocab_size


def recipe(argv: Sequence[str]) -> int:
    """Parse, check, diagnose; returns 0 for a healthy model, 1 for an unhealthy one."""
    args = build_parser().parse_args(argv)
    places = outputs(args)
    diagnosis = diagnose(args)

    from LLMPruner.evaluator.report import report_text

    report = report_text(diagnosis)
    print(report, end="")
    if path := places.get("save_report"):
        if path.suffix == ".json":
            write_json(path, diagnosis.as_dict())
        else:
            write_text(path, report)
    if "plot" in places and diagnosis.damage is not None:
        from LLMPruner.evaluator.damage_plot import plot_damage

        plot_damage(places["plot"], diagnosis.damage)
    return 0 if diagnosis.healthy else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
