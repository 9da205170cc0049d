"""A dense and a pruned GGUF in llama.cpp: prefill and decode tokens/s of both, PPL, and the ratios, as a Markdown table.

Runs in an environment with llama-cpp-python, for example the one that `make test-consumers` builds, and needs nothing else:

    .consumers/llama-cpp/bin/python benchmarks/served.py --dense dense/model.gguf --pruned pruned/model.gguf

The two models take turns, so that a machine that slows down slows both; the median counts. Compare files of one precision;
with `--quantize Q4_K_M` both are first quantized by llama.cpp itself, into a folder that is gone afterwards.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script of the repository, not of an installed package

from LLMPruner.evaluator.engine_timer import LlamaCpp, rates

ROLES = ("dense", "pruned")
QUANTIZED = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
PPL_TOKENS = 512  # of a window


class Parser(argparse.ArgumentParser):
    """One sentence on stderr and exit code 2 for a wrong command."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, without the usage dump."""
        self.exit(2, f"error: {message} (see --help)\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked; exits with 2 where they are wrong."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for role in ROLES:
        parser.add_argument(f"--{role}", required=True, metavar="FILE.gguf", help=f"the {role} model")
    for name, default, what in (
        ("repeats", 7, "timed repeats of each model, taking turns"),
        ("prompt_tokens", 512, "tokens of the prompt that is prefilled"),
        ("new_tokens", 64, "tokens decoded after it, one at a time"),
        ("threads", 1, "threads of llama.cpp"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: {default})")
    parser.add_argument("--quantize", choices=QUANTIZED, help="quantize both files first (they must be f32, f16 or bf16)")
    parser.add_argument("--text", metavar="FILE.txt", help=f"also measure PPL on its first windows of {PPL_TOKENS} tokens")
    parser.add_argument("--windows", type=int, default=8, help="windows for the PPL (default: 8)")
    args = parser.parse_args(argv)
    if args.text is not None and not Path(args.text).is_file():
        parser.error(f"--text {args.text} is not a file")
    for name in ("repeats", "prompt_tokens", "new_tokens", "threads", "windows"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(args, name)}")
    for role in ROLES:
        problem = unreadable(getattr(args, role))
        if problem:
            parser.error(f"--{role} {getattr(args, role)} {problem}")
    if Path(args.dense).samefile(args.pruned):
        parser.error("--dense and --pruned are the same file")
    return args


def unreadable(path: str) -> str | None:
    """Why the file is no GGUF; None where it is one."""
    try:
        with open(path, "rb") as handle:
            return None if handle.read(4) == b"GGUF" else "is not a GGUF file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def quantize(path: str, kind: str, folder: str, role: str) -> str:
    """The file as llama.cpp quantizes it, in `folder`. Raises ValueError where it does not."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    place = Path(folder, f"{role}.gguf")
    if llama_cpp.llama_model_quantize(path.encode(), str(place).encode(), settings):
        raise ValueError(f"it cannot be quantized to {kind}")
    return str(place)


def perplexity(path: str, text: str, windows: int, threads: int) -> float:
    """PPL of the first windows of a text, none of which sees the one before. Raises ValueError for a text too short."""
    import numpy
    from llama_cpp import Llama

    model = Llama(path, n_ctx=PPL_TOKENS, n_batch=PPL_TOKENS, n_threads_batch=threads, logits_all=True, verbose=False)
    ids = model.tokenize(text.encode(), add_bos=False, special=False)
    if len(ids) < windows * PPL_TOKENS:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than {windows} windows of {PPL_TOKENS}")
    loss = 0.0
    for start in range(0, windows * PPL_TOKENS, PPL_TOKENS):
        window = ids[start : start + PPL_TOKENS]
        model.reset()
        model.eval(window)
        logits = numpy.asarray(model.scores[: PPL_TOKENS - 1], dtype=numpy.float64)
        logits -= logits.max(-1, keepdims=True)
        loss += (numpy.log(numpy.exp(logits).sum(-1)) - logits[range(PPL_TOKENS - 1), window[1:]]).sum()
    return math.exp(loss / (windows * (PPL_TOKENS - 1)))


def table(speeds: dict[str, dict[str, float]], sizes: dict[str, int], ppl: dict[str, float]) -> str:
    """The Markdown table: a row for each phase, the files' sizes, and the PPL where it was measured."""
    rows = [
        (
            f"{phase} (tokens/s)",
            *(f"{speeds[role][phase]:,.1f}" for role in ROLES),
            speeds["pruned"][phase] / speeds["dense"][phase],
        )
        for phase in ("prefill", "decode")
    ]
    rows.append(("file (MB)", *(f"{sizes[role] / 1e6:,.1f}" for role in ROLES), sizes["pruned"] / sizes["dense"]))
    if ppl:
        rows.append(("PPL", *(f"{ppl[role]:.2f}" for role in ROLES), ppl["pruned"] / ppl["dense"]))
    lines = ["||dense|pruned|ratio|", "|---|---|---|---|"]
    return "\n".join(lines + [f"|{name}|{dense}|{pruned}|{ratio:.2f}|" for name, dense, pruned, ratio in rows])


def compare(args: argparse.Namespace, folder: str) -> str:
    """Everything that is measured, as text. Raises ValueError, naming the file, where llama.cpp cannot run one."""
    import llama_cpp

    paths, models, ppl = {}, {}, {}
    for role in ROLES:
        path = getattr(args, role)
        try:
            paths[role] = quantize(path, args.quantize, folder, role) if args.quantize else path
            if args.text is not None:
                text = Path(args.text).read_text(encoding="utf-8")
                ppl[role] = perplexity(paths[role], text, args.windows, args.threads)
            models[role] = LlamaCpp(paths[role], vars(args))
        except ValueError as error:
            raise ValueError(f"llama.cpp cannot run --{role} {path}: {error}") from error
    sizes = {role: Path(path).stat().st_size for role, path in paths.items()}
    kinds = ", ".join(f"{role} {models[role].model.metadata.get('general.name', '?')}" for role in ROLES)
    lengths = f"{args.prompt_tokens} + {args.new_tokens} tokens, median of {args.repeats}"
    about = (
        f"llama-cpp-python {llama_cpp.__version__}, {args.threads} thread(s), {args.quantize or 'as given'}, {lengths}; {kinds}"
    )
    if ppl:
        about += f"; PPL on {args.windows} windows of {PPL_TOKENS} tokens of {Path(args.text).name}"
    vocab = min(model.vocab for model in models.values())
    return f"{table(rates(models, vocab, vars(args)), sizes, ppl)}\n\n{about}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 2 for a wrong command."""
    args = parse(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(compare(args, folder))
    except ImportError:
        print("error: llama-cpp-python is missing: run this by .consumers/llama-cpp/bin/python", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
