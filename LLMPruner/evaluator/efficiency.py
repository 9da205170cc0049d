"""What a model costs to run: parameters, bytes, FLOPs, KV cache, and measured speed and memory.

All models are timed in one process, their repeats interleaved, so that whatever else the machine does hits all alike;
medians are reported, and ratios against the first model. Absolute times hold for this machine only.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from LLMPruner.memory import peak_memory, reset_peak_memory
from LLMPruner.plan import PruningPlan

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from LLMPruner.config import EfficiencyConfig
    from LLMPruner.model.load import LoadedModel

logger = logging.getLogger("LLMPruner")

BATCHES = (1, 8)  # sequences decoded together


@dataclass(frozen=True)
class Efficiency:
    """Figures of one model. Rates are tokens a second over the whole batch, times seconds, memory bytes."""

    parameters: int
    file_bytes: int
    flops_per_token: int
    kv_bytes_per_token: int
    prefill_rate: float
    decode_rates: dict[int, float]  # by batch size
    first_token_seconds: float
    peak_bytes: int  # the weights, and the most that a prefill or decoding took beside them

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"decode_rates": {str(batch): rate for batch, rate in self.decode_rates.items()}}


def flops_per_token(plan: PruningPlan, context: int) -> int:
    """Floating-point operations of one token's forward pass with `context` tokens in the cache, a multiply-add being two.

    Projections and head count two a weight; attention scores and values two a query column and cached token each. Embedding
    look-up, norms and rotation are left out.
    """
    geometry = plan.geometry
    weights = sum(sum(plan.counts(part.name)) * geometry.unit_params(part.name) for part in geometry.table.sublayers)
    head = geometry.vocab_size * geometry.hidden_size
    attention = 2 * context * sum(plan.kv_counts) * geometry.group_width
    return 2 * (weights + head + attention)


@torch.no_grad()
def kv_bytes_per_token(model: LlamaForCausalLM, tokens: int = 8) -> int:
    """Bytes that a token adds to the KV cache, counted on the cache's own tensors."""
    ids = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    held = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None)
    return sum(tensor.numel() * tensor.element_size() for tensor in held) // tokens


def measure_efficiency(
    models: Mapping[str, LoadedModel], files: Mapping[str, Path], config: EfficiencyConfig
) -> dict[str, Efficiency]:
    """Measure every model, by role; `files` are where their weights lie."""
    generator = torch.Generator().manual_seed(0)
    vocab = min(loaded.plan.geometry.vocab_size for loaded in models.values())
    prompt = torch.randint(vocab, (1, config.prompt_tokens), generator=generator)
    tasks: dict[str, Callable[[LlamaForCausalLM], float]] = {"prefill": lambda model: time_prefill(model, prompt)}
    for batch in BATCHES:
        start = torch.randint(vocab, (batch, config.decode_context), generator=generator)
        tasks[f"decode {batch}"] = lambda model, start=start: time_decode(model, start, config.new_tokens)
    seconds = {role: {task: [] for task in tasks} for role in models}
    rise = dict.fromkeys(models, 0)
    for repeat in tqdm(range(config.repeats + 1), desc="efficiency", disable=None, leave=False):
        for task, run in tasks.items():
            for role, loaded in models.items():
                device = str(loaded.model.device)
                reset_peak_memory(device)
                before = peak_memory(device)  # what is held
                taken = run(loaded.model)
                if repeat:  # the first round warms up
                    seconds[role][task].append(taken)
                    rise[role] = max(rise[role], peak_memory(device) - before)
    results = {}
    for role, loaded in models.items():
        median = {task: statistics.median(values) for task, values in seconds[role].items()}
        results[role] = Efficiency(
            parameters=loaded.plan.total_params,
            file_bytes=file_bytes(files[role]),
            flops_per_token=flops_per_token(loaded.plan, config.prompt_tokens),
            kv_bytes_per_token=kv_bytes_per_token(loaded.model),
            prefill_rate=config.prompt_tokens / median["prefill"],
            decode_rates={batch: batch * config.new_tokens / median[f"decode {batch}"] for batch in BATCHES},
            first_token_seconds=median["prefill"],
            peak_bytes=weight_bytes(loaded.model) + rise[role],
        )
        logger.info("efficiency %s: %s", role, results[role].as_dict())
    return results


@torch.no_grad()
def time_prefill(model: LlamaForCausalLM, prompt: torch.Tensor) -> float:
    """Seconds from a prompt `(batch, tokens)` to its first new token; logits of the last position only."""
    prompt = prompt.to(model.device)

    def run() -> None:
        model(input_ids=prompt, use_cache=True, logits_to_keep=1).logits.argmax(-1).cpu()

    return _timed(run, model.device)


@torch.no_grad()
def time_decode(model: LlamaForCausalLM, start: torch.Tensor, new_tokens: int) -> float:
    """Seconds for `new_tokens` greedy tokens after a prompt `(batch, tokens)` that is in the cache already."""
    output = model(input_ids=start.to(model.device), use_cache=True, logits_to_keep=1)
    cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)

    def run() -> None:
        nonlocal token
        for _ in range(new_tokens):
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        token.cpu()  # waits for whatever device computes it

    return _timed(run, model.device)


def _timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of `run`: by events on CUDA, by the clock elsewhere."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, shared ones counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def file_bytes(path: Path) -> int:
    """Bytes of a model's weights on disk: the file, or the safetensors of a directory."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))


def efficiency_table(results: Mapping[str, Efficiency], device: str, dtype: str, config: EfficiencyConfig) -> str:
    """A line per figure, a column per model, ratios against the first one in brackets."""
    first = next(iter(results.values()))
    rows: list[tuple[str, Callable[[Efficiency], float], str]] = [
        ("parameters", lambda e: e.parameters, "{:,.0f}"),
        ("weights on disk (MB)", lambda e: e.file_bytes / 1e6, "{:,.1f}"),
        (f"MFLOPs a token (context {config.prompt_tokens})", lambda e: e.flops_per_token / 1e6, "{:,.1f}"),
        ("KV cache a token (bytes)", lambda e: e.kv_bytes_per_token, "{:,.0f}"),
        (f"prefill (tokens/s, 1 x {config.prompt_tokens})", lambda e: e.prefill_rate, "{:,.1f}"),
        *((f"decode (tokens/s, batch {batch})", lambda e, batch=batch: e.decode_rates[batch], "{:,.1f}") for batch in BATCHES),
        ("time to first token (s)", lambda e: e.first_token_seconds, "{:.3f}"),
        ("peak memory (MB)", lambda e: e.peak_bytes / 1e6, "{:,.1f}"),
    ]
    where = f"{device}, {dtype}, {torch.get_num_threads()} threads" if device == "cpu" else f"{device}, {dtype}"
    lines = [f"Efficiency on {where}: medians of {config.repeats} interleaved repeats, ratios to {next(iter(results))}"]
    lines.append(f"{'':36}" + "".join(f"{role:>26}" for role in results))
    for label, value, form in rows:
        cells = []
        for result in results.values():
            ratio = value(result) / value(first) if value(first) else float("nan")
            cells.append(f"{form.format(value(result)) + f' ({ratio:.3f}x)':>26}")
        lines.append(f"{label:36}" + "".join(cells))
    return "\n".join(lines)
