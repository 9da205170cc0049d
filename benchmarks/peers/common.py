"""What every peer needs: the exported inputs, perplexity, and rows in quality.json. Needs no more than a peer's own venv."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Inputs:
    """What export_inputs.py wrote; windows are int64 `(n, seq_len)`."""

    folder: Path
    setting: dict[str, Any]  # model, windows and seq_len, as in quality.json
    seed: int  # that drew the calibration windows
    calibration: dict[str, torch.Tensor]
    test: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """A peer's method: `prune(model, ratio, windows)` returns the model with about `ratio` of all parameters removed."""

    prune: Callable[[Any, float, torch.Tensor], Any]
    calibrated: bool  # whether it looks at the windows


def read_inputs(folder: Path) -> Inputs:
    """The windows and their setting; the model is loaded anew for every row."""
    with safe_open(folder / "windows.safetensors", "pt") as file:
        setting, seed = json.loads(file.metadata()["setting"]), int(file.metadata()["seed"])
        windows: dict[str, dict[str, torch.Tensor]] = {"calibration": {}, "test": {}}
        for key in file.keys():  # noqa: SIM118 (a safetensors handle, not a dict)
            part, corpus = key.split(".", 1)
            windows[part][corpus] = file.get_tensor(key)
    return Inputs(folder, setting, seed, **windows)


def load_dense(inputs: Inputs) -> Any:
    """The dense model in float32."""
    model = LlamaForCausalLM.from_pretrained(inputs.folder / "model").eval()
    model.config.use_cache = False  # no keys and values are kept: they would only cost memory
    return model


def count_parameters(model: Any) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean loss over all predicted tokens of `windows`."""
    loss = 0.0
    for window in windows:
        logits = model(input_ids=window[None]).logits[0, :-1]  # (seq_len - 1, vocab)
        loss += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(loss / (len(windows) * (windows.shape[1] - 1)))


def measure(inputs: Inputs, name: str, peer: Peer, ratio: float, corpus: str) -> dict[str, Any]:
    """Prune a fresh model and evaluate it: a row with the keys of quality.py's."""
    model, windows = load_dense(inputs), inputs.calibration[corpus]
    total = count_parameters(model)
    reset_peak_memory()
    start = time.perf_counter()
    model = peer.prune(model, ratio, windows)
    seconds, memory = time.perf_counter() - start, peak_memory()
    return {
        "row": name,
        "ratio": ratio,
        "calibration": corpus,
        "seed": inputs.seed,
        "calibration_tokens": windows.numel() if peer.calibrated else 0,
        "removed": total - count_parameters(model),
        "kv_groups": None,
        "channels": None,
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(memory / 1e9, 2),
        "results": {name: {"ppl": perplexity(model, rows)} for name, rows in inputs.test.items()},
    }


def reset_peak_memory() -> None:
    """Start a new high-water mark of memory, where Linux lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The process's peak in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def read_record(path: Path, inputs: Inputs) -> dict[str, Any]:
    """quality.json, checked to be about the same model and windows."""
    if not path.exists():
        raise SystemExit(f"error: {path} does not exist: run benchmarks/quality.py first")
    record = json.loads(path.read_text())
    for key, value in inputs.setting.items():
        if record[key] != value:
            raise SystemExit(f"error: {path} has {key} {record[key]}, the exported inputs have {value}: export them again")
    return record


def add_row(path: Path, inputs: Inputs, row: dict[str, Any]) -> None:
    """Append to quality.json as it is now, by renaming a complete file over it."""
    record = read_record(path, inputs)
    record["rows"].append(row)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def check_dense(inputs: Inputs, record: dict[str, Any]) -> None:
    """Stop unless the dense model has quality.json's own perplexity here too: another transformers must read it alike."""
    corpus = next(iter(inputs.test))
    ours = perplexity(load_dense(inputs), inputs.test[corpus])
    theirs = record["dense"]["results"][corpus]["ppl"]
    print(f"dense, {corpus}: ppl {ours:.4f} here, {theirs:.4f} in quality.json", flush=True)
    if not math.isclose(ours, theirs, rel_tol=5e-3):  # quality.json's may have been taken in bfloat16
        raise SystemExit("error: the dense model's perplexity differs from quality.json's: export the inputs again")


def run(description: str | None, peers: Mapping[str, Peer], argv: Sequence[str] | None = None) -> int:
    """Measure the rows that quality.json lacks, and write it after every one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--inputs", type=Path, required=True, help="folder that export_inputs.py wrote")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of quality.json")
    parser.add_argument("--rows", nargs="+", default=list(peers), choices=list(peers))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.15, 0.25, 0.35], help="of the whole model")
    parser.add_argument("--calibrations", nargs="+", help="of the exported ones (default: all)")
    args = parser.parse_args(argv)
    inputs, path = read_inputs(args.inputs), args.output / "quality.json"
    rows = [row for row in read_record(path, inputs)["rows"] if row["seed"] == inputs.seed]
    done = {(row["row"], row["ratio"], row["calibration"]) for row in rows}
    wanted = product(args.calibrations or inputs.calibration, args.ratios, args.rows)
    missing = [(name, ratio, corpus) for corpus, ratio, name in wanted if (name, ratio, corpus) not in done]
    if missing:
        check_dense(inputs, read_record(path, inputs))
    for name, ratio, corpus in missing:
        twins = [row for row in rows if (row["row"], row["ratio"], row["calibration_tokens"]) == (name, ratio, 0)]
        # what reads no calibration text is the same model under every corpus: measured once
        row = {**twins[0], "calibration": corpus} if twins else measure(inputs, name, peers[name], ratio, corpus)
        add_row(path, inputs, row)
        rows.append(row)
        print({key: row[key] for key in ("row", "ratio", "calibration", "removed", "seconds", "results")}, flush=True)
    return 0
