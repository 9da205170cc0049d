"""Flag groups shared by the scripts, and the one way a script ends: exit codes 0, 1, 2 and 130, one sentence on stderr.

Nothing here imports torch: `--help` and wrong arguments answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar, get_args, get_type_hints

from LLMPruner import parallel
from LLMPruner.config import (
    EXPORT_FORMATS,
    GGUF_TYPES,
    PRESETS,
    STREAM,
    TEXT_FORMATS,
    CommonConfig,
    EvalConfig,
    ExportConfig,
    PruneConfig,
)
from LLMPruner.errors import RunError, UsageError, one_line
from LLMPruner.evaluator.engines import PACKAGES
from LLMPruner.importance.allocation import STRATEGIES
from LLMPruner.importance.criteria import CRITERIA
from LLMPruner.importance.layer_analyzer import LAYER_METHODS
from LLMPruner.memory import out_of_memory
from LLMPruner.methods.repair import REPAIRS
from LLMPruner.model.device import DTYPES
from LLMPruner.training_config import OPTIMIZERS, REPORTS, TEACHER_ANSWERS, DistillConfig, FinetuneConfig, LoraConfig

# Without it cuBLAS is not deterministic under `model.device.deterministic`; read when torch first uses the GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

Config = TypeVar("Config")


class Parser(argparse.ArgumentParser):
    """An argparse parser for this suite: no abbreviations, and defaults shown in the help."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)

    def error(self, message: str) -> Any:
        """One sentence on stderr and exit code 2, without the usage dump that would bury it."""
        self.exit(_finish(f"{message} (see --help)", 2))


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default == argparse.SUPPRESS:
            return action.help
        return super()._get_help_string(action)


class Switch(argparse.Action):
    """A flag that can be switched off: `--name` and `--no_name` (the document's spelling; argparse's is `--no-name`)."""

    def __init__(self, option_strings: Sequence[str], dest: str, default: bool | None = None, help: str | None = None) -> None:
        names = [name for option in option_strings for name in (option, "--no_" + option[2:])]
        super().__init__(names, dest, nargs=0, default=default, help=help)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        """Store True for --name, False for --no_name."""
        setattr(namespace, self.dest, not (option_string or "").startswith("--no_"))


def run_script(recipe: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None, *, shared: bool = False) -> int:
    """Call `recipe(arguments)` and turn how it ends into an exit code: its own, 1 failed, 2 wrong command, 130 interrupted.

    `shared`: several processes can share its work.
    """
    try:
        if parallel.count() > 1 and not shared:
            raise UsageError("this script is one process: start it with python, without a launcher")
        code = recipe(list(sys.argv[1:] if argv is None else argv)) or 0
        parallel.leave()
        return code
    except KeyboardInterrupt:
        return _finish("interrupted", 130)
    except UsageError as error:
        return _finish(error, 2)
    except RunError as error:
        return _finish(error, 1)
    except Exception as error:
        if out_of_memory(error):
            return _finish(
                f"memory ran out ({one_line(error)[:120]}): {SMALLER}", 1, "; ".join(getattr(error, "__notes__", []))
            )
        if not getattr(error, "__notes__", None):  # no log has the traceback
            traceback.print_exc()
        return _finish(f"{type(error).__name__}: {error}", 1, "; ".join(getattr(error, "__notes__", [])))


SMALLER = "use --stream on, fewer or shorter windows, or a smaller batch; --resume goes on with a pruning that was cut off"


GRACE = 10.0  # seconds in which a launcher ends the other processes after one has failed


def _finish(message: object, code: int, note: str = "") -> int:
    """Say why, in one sentence. Of several processes the first one says what all find before they have met."""
    sentence = " ".join(str(message).split())
    if not parallel.main():
        if not parallel.started():
            time.sleep(GRACE)
        note = "; ".join(filter(None, (note, f"process {parallel.rank()} of {parallel.count()}")))
    print(f"error: {sentence}" + (f" ({note})" if note else ""), file=sys.stderr)
    return code


# What a flag may be, where its type does not say so; the registries are what there is.
CHOICES: dict[str, Any] = {
    "dtype": DTYPES,
    "text_format": TEXT_FORMATS,
    "stream": STREAM,
    "ratio_base": ("auto", "model", "selected"),
    "layer_importance_method": LAYER_METHODS,
    "pruning_strategy": STRATEGIES,
    "importance": CRITERIA,
    "repair": REPAIRS,
    "calibration_bos": ("auto", "on", "off"),
    "teacher_answers": TEACHER_ANSWERS,
    "optimizer": OPTIMIZERS,
    "report_to": REPORTS,
    "engine": tuple(PACKAGES),
}


def add_settings(
    parser: argparse.ArgumentParser, config: type, title: str, *, prefix: str = "", leave_out: Collection[str] = ()
) -> None:
    """A flag `--<prefix><name>` for every field of the dataclass `config` that is a `config.setting`."""
    hints = get_type_hints(config)
    group = parser.add_argument_group(title)
    for entry in fields(config):
        if "help" not in entry.metadata or entry.name in leave_out:
            continue
        if entry.metadata["group"] not in (None, group.title):
            group = parser.add_argument_group(entry.metadata["group"])
        kind, default = hints[entry.name], entry.default
        options: dict[str, Any] = {"help": entry.metadata["help"], "default": default}
        if kind is bool:
            options["action"] = Switch
        elif isinstance(default, tuple):
            options |= {"nargs": "+", "default": list(default)}
        else:
            options["type"] = next(part for part in (*get_args(kind), kind) if part is not type(None))
            options["choices"] = CHOICES.get(entry.name)
        group.add_argument(f"--{prefix}{entry.name}", **options)


def settings_of(config: type, args: argparse.Namespace, prefix: str = "") -> dict[str, Any]:
    """The values that the flags `--<prefix><name>` gave to the fields of `config`."""
    names = [entry.name for entry in fields(config) if "help" in entry.metadata and hasattr(args, prefix + entry.name)]
    values = {name: getattr(args, prefix + name) for name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def config_of(config: type[Config], args: argparse.Namespace, prefix: str = "") -> Config:
    """The `config` that the flags `--<prefix><name>` describe."""
    return config(**settings_of(config, args, prefix))


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """--seed, --dtype, --device, --stream, --data_dir and the like: the same on every script."""
    add_settings(parser, CommonConfig, "machine and data")


def add_eval_flags(parser: argparse.ArgumentParser, *, seq_len: bool = True) -> None:
    """--eval_datasets, --eval_samples and --eval_seq_len, unless the script has a flag of its own for the window length."""
    add_settings(parser, EvalConfig, "evaluation", prefix="eval_", leave_out=() if seq_len else ("seq_len",))


def add_prune_flags(parser: argparse.ArgumentParser) -> None:
    """What to remove and how: budget, layers, and the three choices importance, strategy, repair."""
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="set --importance, --pruning_strategy, --repair (best: also its text, distillation) at once; explicit flags win",
    )
    add_settings(parser, PruneConfig, "budget")
    layers = parser.add_argument_group("layer scores of an earlier run")
    layers.add_argument(
        "--skip_importance_analysis", action="store_true", help="re-use the scores of --layer_importance_config"
    )
    layers.add_argument("--layer_importance_config", metavar="FILE", help="layer_importance_config.json of an earlier run")


def add_lora_flags(parser: argparse.ArgumentParser) -> None:
    """--lora_*: rank, scale, dropout, targets (no target flag means both); --use_dora, --use_rslora."""
    add_settings(parser, LoraConfig, "LoRA", prefix="lora_")
    variants = parser.add_argument_group("LoRA's variants")
    variants.add_argument("--use_dora", action=Switch, default=False, help="weight-decomposed LoRA (Liu et al. 2024)")
    variants.add_argument("--use_rslora", action=Switch, default=False, help="scaled by the rank's root (Kalajdzievski 2023)")
    parser.set_defaults(lora_target_attention=None, lora_target_mlp=None)


def add_training_flags(parser: argparse.ArgumentParser, prefix: str) -> None:
    """Training flags, spelled `--<prefix>lr` and so on: `test_finetuning.py` has no prefix, pruning has `finetune_`.

    Those of distillation are the same in both.
    """
    add_settings(parser, FinetuneConfig, "training", prefix=prefix)
    add_settings(parser, DistillConfig, "distillation")


def add_gguf_flag(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """--gguf_type."""
    parser.add_argument(
        "--gguf_type",
        choices=GGUF_TYPES,
        default=ExportConfig().gguf_type,
        help="precision of a GGUF; auto: the weights' own; for K-quants go on with llama-quantize",
    )


def add_export_flags(parser: argparse.ArgumentParser) -> None:
    """--export and --gguf_type."""
    group = parser.add_argument_group("export")
    group.add_argument(
        "--export",
        nargs="+",
        choices=list(EXPORT_FORMATS),
        default=[],
        help="also write the model for other loaders: hf (transformers, vLLM), gguf (llama.cpp), padded (any loader, at the "
        "widest layer's size)",
    )
    add_gguf_flag(group)


def export_config(args: argparse.Namespace) -> ExportConfig:
    """Export settings of the flags."""
    return ExportConfig(tuple(args.export), args.gguf_type)


def lora_config(args: argparse.Namespace) -> LoraConfig:
    """LoRA settings of the flags; without a target flag both sublayers get adapters."""
    attention, mlp = args.lora_target_attention, args.lora_target_mlp
    if attention is None and mlp is None:
        attention = mlp = True
    elif attention is None:
        attention = not mlp  # --no_lora_target_mlp alone means attention
    elif mlp is None:
        mlp = not attention
    chosen = {"target_attention": attention, "target_mlp": mlp, "use_dora": args.use_dora, "use_rslora": args.use_rslora}
    return LoraConfig(**settings_of(LoraConfig, args, "lora_") | chosen)


def finetune_config(args: argparse.Namespace, prefix: str, method: str) -> FinetuneConfig:
    """Training settings of the flags spelled with `prefix`. Raises UsageError for settings of LoRA without LoRA."""
    wanted = [name for name in ("lora_target_attention", "lora_target_mlp", "use_dora", "use_rslora") if getattr(args, name)]
    if method == "full" and wanted:
        needed = f"--{prefix}method lora" if prefix else "--use_lora"
        raise UsageError(f"--{' and --'.join(wanted)} {'needs' if len(wanted) == 1 else 'need'} {needed}")
    values = settings_of(FinetuneConfig, args, prefix)
    distill = DistillConfig(**settings_of(DistillConfig, args))
    if not distill.distill and replace(distill, teacher=None) != DistillConfig():
        raise UsageError("--distill_alpha, --distill_temperature, --teacher_answers and --teacher_draws need --distill")
    return FinetuneConfig(method=method, lora=lora_config(args), distill=distill, prefix=f"--{prefix}", **values)


def eval_config(args: argparse.Namespace, seq_len: int) -> EvalConfig:
    """Evaluation settings of the flags, over windows of `seq_len`."""
    return EvalConfig(tuple(args.eval_datasets), seq_len, args.eval_samples, text_format=args.text_format)


def common_config(args: argparse.Namespace) -> CommonConfig:
    """Seed, precision, device, data folder and text format of the flags."""
    return CommonConfig(**settings_of(CommonConfig, args))


def prune_config(args: argparse.Namespace) -> PruneConfig:
    """Pruning settings of the flags. Raises UsageError where scores to re-use are half asked for."""
    if args.skip_importance_analysis != (args.layer_importance_config is not None):
        raise UsageError("--skip_importance_analysis and --layer_importance_config FILE go together")
    return PruneConfig(**settings_of(PruneConfig, args), layer_importance_file=args.layer_importance_config)
