"""Compare dense, pruned and fine-tuned models by perplexity over the same windows."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner import __version__, cli
from LLMPruner.checkpoint import write_json
from LLMPruner.config import EfficiencyConfig, EvalConfig, RunConfig, require_at_least
from LLMPruner.data import check_corpus
from LLMPruner.errors import UsageError
from LLMPruner.evaluator.report import LANGUAGES, ROLES, comparison_table, results_json, tables_of
from LLMPruner.run import start_logging, stop_logging
from LLMPruner.source import ModelSource, check_seq_len, check_token_ids, find_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from LLMPruner.evaluator.ppl import Perplexity


def build_parser() -> argparse.ArgumentParser:
    """All flags of the evaluation script."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--original_model", help="the dense model: Hugging Face directory, hub id, .gguf file, or 'embedded'")
    parser.add_argument("--pruned_model", help="the pruned model: pytorch_model.bin, or an exported directory")
    parser.add_argument("--finetuned_model", help="the fine-tuned model: pytorch_model_finetuned.bin, or an export")
    parser.add_argument("--seq_len", type=int, default=EvalConfig().seq_len, help="tokens of an evaluation window")
    parser.add_argument("--save_results", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--table_lang", choices=sorted(LANGUAGES), default="zh", help="language of the table")
    group = parser.add_argument_group("efficiency")
    defaults = EfficiencyConfig()
    group.add_argument("--efficiency", action="store_true", help="also measure size, FLOPs, KV cache, speed and memory")
    for name, text in (
        ("prompt_tokens", "tokens of the prompt that prefill is timed on"),
        ("new_tokens", "tokens decoded"),
        ("repeats", "timed repeats, interleaved over the models; the median counts"),
    ):
        group.add_argument(f"--efficiency_{name}", type=int, default=getattr(defaults, name), help=text)
    cli.add_eval_flags(parser, seq_len_flag=None)
    cli.add_run_flags(parser)
    return parser


def recipe(argv: Sequence[str]) -> None:
    """Parse, check, measure, print."""
    args = build_parser().parse_args(argv)
    require_at_least("--seq_len", args.seq_len, 2)  # EvalConfig would call it --eval_seq_len
    evaluation, settings = cli.eval_config(args, args.seq_len), cli.run_config(args)
    paths = {role: getattr(args, f"{role}_model") for role in ROLES if getattr(args, f"{role}_model") is not None}
    if not paths:
        raise UsageError("nothing to evaluate: give --original_model, --pruned_model or --finetuned_model")
    if args.save_results is not None:
        cli.check_output_file(args.save_results, "--save_results")
    sources = {role: find_model(path, f"--{role}_model") for role, path in paths.items()}
    for source in sources.values():
        check_seq_len(source, "--seq_len", evaluation.seq_len)
    efficiency = efficiency_config(args, sources) if args.efficiency else None
    for name in evaluation.datasets:
        check_corpus(name, settings.data_dir, "test", evaluation.seq_len)
    handlers = start_logging()
    try:
        compare(sources, evaluation, settings, efficiency, args.save_results, args.table_lang)
    finally:
        stop_logging(handlers)


def efficiency_config(args: argparse.Namespace, sources: Mapping[str, ModelSource]) -> EfficiencyConfig:
    """How speed is to be measured. Raises UsageError where the tokens do not fit a model's positions."""
    config = EfficiencyConfig(
        prompt_tokens=args.efficiency_prompt_tokens, new_tokens=args.efficiency_new_tokens, repeats=args.efficiency_repeats
    )
    for source in sources.values():
        check_seq_len(source, "--efficiency_prompt_tokens", config.prompt_tokens)
        check_seq_len(
            source, "--efficiency_new_tokens (and what is in the cache before)", config.decode_context + config.new_tokens
        )
    return config


def compare(
    sources: Mapping[str, ModelSource],
    evaluation: EvalConfig,
    settings: RunConfig,
    efficiency: EfficiencyConfig | None,
    save_results: str | None,
    lang: str,
) -> None:
    """Measure one model after the other over the same windows; print the tables and write the JSON."""
    from LLMPruner.model import load_tokenizer, resolve_device, resolve_dtype, versions

    device = resolve_device(settings.device)
    tokenizers = {role: load_tokenizer(source) for role, source in sources.items()}
    windows = shared_windows(sources, tokenizers, evaluation, settings.data_dir)
    results = {role: measure_model(source, tokenizers[role], windows, role, settings) for role, source in sources.items()}
    parameters = {role: source.plan.total_params for role, source in sources.items()}
    print(comparison_table(tables_of(results, parameters), lang))
    costs = measure_costs(sources, tokenizers, settings, efficiency) if efficiency is not None else {}
    if save_results is not None:
        environment = {
            "seq_len": evaluation.seq_len,
            "samples": evaluation.samples,
            "windows": {name: len(rows) for name, rows in windows.items()},
            "device": str(device),
            "dtype": str(resolve_dtype(settings.dtype, device)).removeprefix("torch."),
            "versions": {"LLMPruner": __version__, **versions()},
            **({"efficiency": costs} if costs else {}),
        }
        paths = {role: os.fspath(source.path) for role, source in sources.items()}
        write_json(Path(save_results), results_json(results, parameters, paths, **environment))


def shared_windows(
    sources: Mapping[str, ModelSource],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    evaluation: EvalConfig,
    data_dir: str | None,
) -> dict[str, torch.Tensor]:
    """Windows `(n, seq_len)` of every corpus, cut with the first model's tokenizer before any weight is read.

    Raises UsageError when another model reads the text as other tokens: its PPL per token is then another quantity.
    """
    from LLMPruner.data import token_ids
    from LLMPruner.evaluator.ppl import load_eval_windows

    first, tokenizer = next(iter(tokenizers.items()))
    windows = load_eval_windows(tokenizer, evaluation, data_dir)
    for role, other in tokenizers.items():
        if len(other) != len(tokenizer) or any(
            not token_ids(other, name, "test", data_dir).equal(token_ids(tokenizer, name, "test", data_dir)) for name in windows
        ):
            raise UsageError(f"the tokenizers of --{first}_model and --{role}_model differ: their PPL cannot be compared")
        check_token_ids(sources[role], f"--{role}_model", *windows.values())
    return windows


def measure_model(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    windows: dict[str, torch.Tensor],
    role: str,
    settings: RunConfig,
) -> list[Perplexity]:
    """PPL of one model on every corpus; the model is gone from memory afterwards."""
    from LLMPruner.evaluator.ppl import measure
    from LLMPruner.model import load_model

    loaded = load_model(source, dtype=settings.dtype, device=settings.device, tokenizer=tokenizer)
    results = measure(loaded.model, windows, role)
    del loaded
    gc.collect()  # a model may refer to itself: without this, two could be in memory at once
    return results


def measure_costs(
    sources: Mapping[str, ModelSource],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    settings: RunConfig,
    config: EfficiencyConfig,
) -> dict[str, Any]:
    """Size and speed of all models side by side; prints the table. All are in memory together, so that repeats interleave."""
    from LLMPruner.evaluator.efficiency import efficiency_table, measure_efficiency
    from LLMPruner.model import load_model

    models = {
        role: load_model(source, dtype=settings.dtype, device=settings.device, tokenizer=tokenizers[role])
        for role, source in sources.items()
    }
    measured = measure_efficiency(models, {role: source.path for role, source in sources.items()}, config)
    model = next(iter(models.values())).model
    print(efficiency_table(measured, str(model.device), str(model.dtype).removeprefix("torch."), config))
    return {role: result.as_dict() for role, result in measured.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
