"""Flag groups shared by the scripts, and the one way a script ends: exit codes 0, 1, 2 and 130, one sentence on stderr.

Nothing here imports torch: `--help` and wrong arguments answer at once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from LLMPruner.config import (
    EXPORT_FORMATS,
    GGUF_TYPES,
    PRESETS,
    EvalConfig,
    ExportConfig,
    FinetuneConfig,
    LoraConfig,
    PruneConfig,
    RunConfig,
)
from LLMPruner.errors import RunError, UsageError
from LLMPruner.importance.allocation import STRATEGIES
from LLMPruner.importance.criteria import CRITERIA
from LLMPruner.importance.layer_analyzer import LAYER_METHODS
from LLMPruner.methods.repair import REPAIRS
from LLMPruner.model import DTYPES
from LLMPruner.run import existing_path


class Parser(argparse.ArgumentParser):
    """An argparse parser for this suite: no abbreviations, and defaults shown in the help."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)

    def error(self, message: str) -> Any:
        """One sentence on stderr and exit code 2, without the usage dump that would bury it."""
        self.exit(2, f"error: {message} (see --help)\n")


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


def run_script(recipe: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None) -> int:
    """Call `recipe(arguments)` and turn how it ends into an exit code: its own, 1 failed, 2 wrong command, 130 interrupted."""
    try:
        return recipe(list(sys.argv[1:] if argv is None else argv)) or 0
    except KeyboardInterrupt:
        return _finish("interrupted", 130)
    except UsageError as error:
        return _finish(error, 2)
    except RunError as error:
        return _finish(error, 1)
    except Exception as error:
        if not getattr(error, "__notes__", None):  # no log has the traceback
            traceback.print_exc()
        return _finish(f"{type(error).__name__}: {error}", 1, "; ".join(getattr(error, "__notes__", [])))


def _finish(message: object, code: int, note: str = "") -> int:
    sentence = " ".join(str(message).split())
    print(f"error: {sentence}" + (f" ({note})" if note else ""), file=sys.stderr)
    return code


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """--seed, --dtype, --device, --data_dir: the same on every script."""
    group = parser.add_argument_group("machine and data")
    defaults = RunConfig()
    group.add_argument("--seed", type=int, default=defaults.seed, help="seed of every random choice")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default=defaults.dtype,
        help="precision of the weights; auto: bfloat16 where the hardware is fast at it, else float32",
    )
    group.add_argument("--device", default=defaults.device, help="cpu, cuda, cuda:N, mps; auto: the GPU where there is one")
    group.add_argument(
        "--data_dir", help="folder with local corpora (wikitext-2-raw/test.txt and the like), looked at before the hub"
    )


def add_eval_flags(parser: argparse.ArgumentParser, *, seq_len_flag: str | None = "--eval_seq_len") -> None:
    """--eval_datasets, --eval_samples and the window length (None: the script has a flag of its own for it)."""
    group = parser.add_argument_group("evaluation")
    defaults = EvalConfig()
    group.add_argument("--eval_datasets", nargs="+", default=list(defaults.datasets), help="corpora to report PPL on")
    group.add_argument(
        "--eval_samples", type=int, default=defaults.samples, help="windows spread evenly over the test split; 0: all"
    )
    if seq_len_flag is not None:
        group.add_argument(seq_len_flag, type=int, default=defaults.seq_len, help="tokens of an evaluation window")


def add_prune_flags(parser: argparse.ArgumentParser) -> None:
    """What to remove and how: budget, layers, and the three choices importance, strategy, repair."""
    defaults = PruneConfig()

    def add(group: argparse._ArgumentGroup, name: str, text: str, **options: Any) -> None:
        group.add_argument("--" + name, default=getattr(defaults, name), help=text, **options)

    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="set --importance, --pruning_strategy, --repair (best: also its text, distillation) at once; explicit flags win",
    )
    budget = parser.add_argument_group("budget")
    add(budget, "pruning_ratio", "fraction of the parameters to remove, in (0, 1)", type=float)
    add(budget, "prune_attention", "prune KV groups", action=Switch)
    add(budget, "prune_mlp", "prune MLP channels", action=Switch)
    add(
        budget,
        "ratio_base",
        "base of the ratio; auto: the model when attention and MLP of all layers are pruned, else the selected sublayers",
        choices=("auto", "model", "selected"),
    )
    add(budget, "round_to", "keep channels in multiples of this; default: from the width, 256 at 8B", type=int)
    add(budget, "layer_start", "first layer to prune", type=int)
    add(budget, "layer_end", "layer to stop before; default: all layers", type=int)

    layers = parser.add_argument_group("layers")
    add(layers, "layer_importance_method", "how layers are scored", choices=LAYER_METHODS)
    add(layers, "layer_importance_samples", "windows for the layer scores", type=int)
    add(layers, "layer_importance_seq_len", "tokens of such a window", type=int)
    add(layers, "pruning_strategy", "how scores become rates", choices=STRATEGIES)
    add(layers, "layer_importance_weight", "how strongly scores steer the rates; 0: uniform", type=float)
    add(layers, "min_pruning_rate", "least share a pruned sublayer loses", type=float)
    add(layers, "max_pruning_rate", "largest share a pruned sublayer loses", type=float)
    add(layers, "freeze_top_n_layers", "the N most important layers stay whole", type=int)
    layers.add_argument(
        "--skip_importance_analysis", action="store_true", help="re-use the scores of --layer_importance_config"
    )
    layers.add_argument("--layer_importance_config", metavar="FILE", help="layer_importance_config.json of an earlier run")

    search = parser.add_argument_group("search")
    add(search, "search_generations", "generations after the start, each a measured shift of every sublayer", type=int)
    add(search, "search_tokens", "held-out tokens that KL is measured on, half of them written by the dense model", type=int)
    add(search, "search_minutes", "minutes until the best plan so far is taken, once every sublayer was measured", type=float)
    add(search, "resume", "continue the interrupted search of this experiment", action=Switch)
    add(search, "allow_sublayer_removal", "a whole attention or MLP may go", action=Switch)

    units = parser.add_argument_group("units and repair")
    add(units, "importance", "how KV groups and channels are scored", choices=CRITERIA)
    add(units, "repair", "how what is left is healed", choices=REPAIRS)
    add(units, "channel_importance_samples", "calibration windows for unit scores", type=int)
    add(units, "repair_samples", "calibration windows for the repair; default: as for the unit scores", type=int)
    add(units, "self_samples", "windows that the dense model writes itself, added to those of the repair, if any", type=int)
    add(units, "distill_epochs", "passes of blockwise distillation on the repair's windows, if any", type=int)
    add(units, "calibration_seq_len", "tokens of a calibration window", type=int)
    add(units, "calibration_dataset", "corpus to calibrate on (its train split), or a local text file", type=str)


def add_lora_flags(parser: argparse.ArgumentParser) -> None:
    """--lora_*: rank, scale, dropout, targets (no target flag means both)."""
    group = parser.add_argument_group("LoRA")
    defaults = LoraConfig()
    group.add_argument("--lora_r", type=int, default=defaults.r, help="rank")
    group.add_argument("--lora_alpha", type=int, default=defaults.alpha, help="scale, usually twice the rank")
    group.add_argument("--lora_dropout", type=float, default=defaults.dropout, help="dropout on the adapters' inputs")
    group.add_argument("--lora_target_attention", action=Switch, help="adapters on q, k, v and o")
    group.add_argument("--lora_target_mlp", action=Switch, help="adapters on gate, up and down; no target flag means both")


def add_training_flags(parser: argparse.ArgumentParser, prefix: str) -> None:
    """Training flags, spelled `--<prefix>lr` and so on: `test_finetuning.py` has no prefix, pruning has `finetune_`."""
    group = parser.add_argument_group("training")
    defaults = FinetuneConfig()
    add = lambda name, kind, text: group.add_argument(  # noqa: E731
        f"--{prefix}{name}", type=kind, default=getattr(defaults, name), help=text
    )
    add("lr", float, "learning rate; default: 2e-4 for LoRA, 1e-5 for full fine-tuning")
    add("samples", int, "training windows")
    add("epochs", int, "passes over the training windows")
    add("seq_len", int, "tokens of a training window; use the same for evaluation")
    add("batch_size", int, "windows per step and device")
    add("grad_accum", int, "steps whose gradients are added up")
    add("max_grad_norm", float, "gradient clipping; 0: none")
    add("warmup_steps", int, "steps of linear warm-up; default: 100, but at most a tenth of all steps")
    add("weight_decay", float, "AdamW weight decay")
    add("dataset", str, "corpus to train on (its train split), or a local text file")


def add_gguf_flag(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """--gguf_type."""
    parser.add_argument(
        "--gguf_type", choices=GGUF_TYPES, default=ExportConfig().gguf_type, help="precision of a GGUF; auto: the weights' own"
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


def check_output_file(path: str, flag: str) -> None:
    """Raise UsageError unless a file can be written at `path`."""
    place = existing_path(path, flag)
    special = place.exists() and not place.is_file()  # a folder, or a device that a rename would replace
    try:
        with tempfile.TemporaryFile(dir=place.parent):  # permissions alone do not tell of file systems like /proc
            writable = not special
    except OSError:
        writable = False
    if not writable:
        raise UsageError(f"{flag} {path} cannot be written: give a file in an existing, writable folder")


def lora_config(args: argparse.Namespace) -> LoraConfig:
    """LoRA settings of the flags; without a target flag both sublayers get adapters."""
    attention, mlp = args.lora_target_attention, args.lora_target_mlp
    if attention is None and mlp is None:
        attention = mlp = True
    elif attention is None:
        attention = not mlp  # --no_lora_target_mlp alone means attention
    elif mlp is None:
        mlp = not attention
    return LoraConfig(args.lora_r, args.lora_alpha, args.lora_dropout, attention, mlp)


def finetune_config(args: argparse.Namespace, prefix: str, method: str) -> FinetuneConfig:
    """Training settings of the flags spelled with `prefix`. Raises UsageError for LoRA targets without LoRA."""
    if method == "full" and (args.lora_target_attention or args.lora_target_mlp):
        needed = f"--{prefix}method lora" if prefix else "--use_lora"
        raise UsageError(f"--lora_target_attention and --lora_target_mlp need {needed}")
    names = FinetuneConfig.__dataclass_fields__.keys() - {"method", "lora", "prefix"}
    values = {name: getattr(args, prefix + name) for name in names}
    return FinetuneConfig(method=method, lora=lora_config(args), prefix=f"--{prefix}", **values)


def eval_config(args: argparse.Namespace, seq_len: int) -> EvalConfig:
    """Evaluation settings of the flags, over windows of `seq_len`."""
    return EvalConfig(tuple(args.eval_datasets), seq_len, args.eval_samples)


def run_config(args: argparse.Namespace) -> RunConfig:
    """Seed, precision, device and data folder of the flags."""
    return RunConfig(args.seed, args.dtype, args.device, args.data_dir)


def prune_config(args: argparse.Namespace) -> PruneConfig:
    """Pruning settings of the flags."""
    settings = {name: getattr(args, name) for name in PruneConfig.__dataclass_fields__ if hasattr(args, name)}
    return PruneConfig(**settings, layer_importance_file=args.layer_importance_config)
