"""Flag groups shared by the scripts, and the one way a script ends: exit codes 0, 1, 2 and 130, one sentence on stderr.

Nothing here imports torch: `--help` and wrong arguments answer at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from LLMPruner.config import EvalConfig, FinetuneConfig, LoraConfig, PruneConfig, RunConfig
from LLMPruner.errors import RunError, UsageError

logger = logging.getLogger("LLMPruner")


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
        setattr(namespace, self.dest, not (option_string or "").startswith("--no_"))


def run_script(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None) -> int:
    """Call `main(arguments)` and turn how it ends into an exit code: 0, 1 failed, 2 wrong command, 130 interrupted."""
    try:
        main(list(sys.argv[1:] if argv is None else argv))
        return 0
    except UsageError as error:
        return _finish(error, 2)
    except KeyboardInterrupt:
        return _finish("interrupted: nothing half-written was left behind", 130)
    except RunError as error:
        return _finish(error, 1)
    except Exception as error:
        logger.debug("", exc_info=True)
        return _finish(f"{type(error).__name__}: {error}", 1, traceback.format_exc())


def _finish(message: object, code: int, details: str | None = None) -> int:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    if details is not None:
        print(details, file=sys.stderr)
    return code


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """--seed, --dtype, --device, --data_dir: the same on every script."""
    group = parser.add_argument_group("machine and data")
    defaults = RunConfig()
    group.add_argument("--seed", type=int, default=defaults.seed, help="seed of every random choice")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
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
    add("warmup_steps", int, "steps of linear warm-up (at most a tenth of all steps are used)")
    add("weight_decay", float, "AdamW weight decay")
    add("dataset", str, "corpus to train on (its train split), or a local text file")


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
    """Training settings of the flags spelled with `prefix`."""
    names = (
        "lr",
        "samples",
        "epochs",
        "seq_len",
        "batch_size",
        "grad_accum",
        "max_grad_norm",
        "warmup_steps",
        "weight_decay",
        "dataset",
    )
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
    return PruneConfig(**settings)
