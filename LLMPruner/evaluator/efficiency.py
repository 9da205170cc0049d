"""What a model costs to run: parameters, bytes, FLOPs, KV cache, and measured speed and memory.

All models are timed in one process, their repeats interleaved, so that whatever else the machine does hits all alike;
medians are reported, and ratios against the first model. Absolute times hold for this machine only. On CUDA they are timed as
they are served, too (decoding.py).
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tqdm import tqdm

from LLMPruner.evaluator.decoding import decode_run, on, prefill_shape, served
from LLMPruner.memory import available_memory, peak_memory, reset_peak_memory
from LLMPruner.plan import PruningPlan

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from LLMPruner.config import EfficiencyConfig
    from LLMPruner.model.load import LoadedModel

logger = logging.getLogger("LLMPruner")

BATCHES = (1, 8)  # sequences decoded together
GRAPH, FILLED = "graph", "filled"  # how tasks of what is served are called


@dataclass(frozen=True)
class Efficiency:
    """Figures of one model. Rates are tokens a second over the whole batch, times seconds, memory bytes."""

    BY_BATCH: ClassVar = ("decode_rates", "served_decode_rates")

    parameters: int
    file_bytes: int
    flops_per_token: int
    kv_bytes_per_token: int
    prefill_rate: float
    decode_rates: dict[int, float]  # by batch size
    first_token_seconds: float
    peak_bytes: int  # the weights, and the most that a prefill or decoding took beside them
    decode_bytes: int = 0  # read for a token of batch 1: weights, keys and values
    prefill_flops: int = 0  # of a token of the longest prompt
    served_decode_rates: dict[int, float] = field(default_factory=dict)  # on CUDA, as a graph
    served_prefill_rate: float | None = None  # of prompts that fill the card
    served_prompt: tuple[int, int] | None = None  # how many, and their tokens

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rates = {name: {str(batch): rate for batch, rate in getattr(self, name).items()} for name in self.BY_BATCH}
        return asdict(self) | rates

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Efficiency:
        """From the plain values of `as_dict`."""
        rates = {name: {int(batch): rate for batch, rate in values[name].items()} for name in cls.BY_BATCH}
        return cls(**values | rates | {"served_prompt": values["served_prompt"] and tuple(values["served_prompt"])})


def flops_per_token(plan: PruningPlan, context: int) -> int:
    """Floating-point operations of one token's forward pass with `context` tokens in the cache, a multiply-add being two.

    Projections and head count two a weight; attention scores and values two a query column and cached token each. Embedding
    look-up, norms and rotation are left out.
    """
    return _layer_flops(plan, context) + _head_flops(plan)


def prefill_flops(plan: PruningPlan, tokens: int) -> int:
    """The same of a token of a prompt, on average: it sees half of the prompt, and only the last one goes through the head."""
    return _layer_flops(plan, (tokens + 1) / 2) + _head_flops(plan) // tokens


def _layer_flops(plan: PruningPlan, context: float) -> int:
    geometry = plan.geometry
    weights = sum(sum(plan.counts(part.name)) * geometry.unit_params(part.name) for part in geometry.table.sublayers)
    return 2 * (weights + int(2 * context * sum(plan.kv_counts) * geometry.group_width))


def _head_flops(plan: PruningPlan) -> int:
    return 2 * plan.geometry.vocab_size * plan.geometry.hidden_size


@torch.no_grad()
def kv_bytes_per_token(model: LlamaForCausalLM, tokens: int = 8) -> int:
    """Bytes that a token adds to the KV cache, counted on the cache's own tensors."""
    ids = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    held = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None)
    return sum(tensor.numel() * tensor.element_size() for tensor in held) // tokens


def measure_efficiency(
    models: Mapping[str, LoadedModel], files: Mapping[str, Sequence[Path]], config: EfficiencyConfig
) -> dict[str, Efficiency]:
    """Measure every model, by role; `files` are those of its weights."""
    filled = filling_prompt(models) if all(served(loaded.model) for loaded in models.values()) else None
    median, rise = take_turns(models, timed_tasks(models, config, filled), config.repeats)
    context = config.decode_context + config.new_tokens // 2
    results = {}
    for role, loaded in models.items():
        seconds, kv_bytes = median[role], kv_bytes_per_token(loaded.model)
        results[role] = Efficiency(
            parameters=loaded.plan.total_params,
            file_bytes=sum(path.stat().st_size for path in files[role]),
            flops_per_token=flops_per_token(loaded.plan, config.prompt_tokens),
            kv_bytes_per_token=kv_bytes,
            prefill_rate=config.prompt_tokens / seconds["prefill"],
            decode_rates=decode_rates(seconds, "decode", config),
            first_token_seconds=seconds["prefill"],
            peak_bytes=weight_bytes(loaded.model) + rise[role],
            decode_bytes=weight_bytes(loaded.model, read=True) + context * kv_bytes,
            prefill_flops=prefill_flops(loaded.plan, config.prompt_tokens if filled is None else filled[1]),
            served_decode_rates={} if filled is None else decode_rates(seconds, GRAPH, config),
            served_prefill_rate=None if filled is None else math.prod(filled) / seconds[FILLED],
            served_prompt=filled,
        )
        logger.info("efficiency %s: %s", role, results[role].as_dict())
    return results


def decode_rates(seconds: Mapping[str, float], kind: str, config: EfficiencyConfig) -> dict[int, float]:
    """Tokens a second by batch size, of the median seconds by task."""
    return {batch: batch * config.new_tokens / seconds[f"{kind} {batch}"] for batch in BATCHES}


def filling_prompt(models: Mapping[str, LoadedModel]) -> tuple[int, int]:
    """Prompts and their length that fill what the device has left, the same for all models."""
    model = next(iter(models.values())).model
    free = available_memory(str(model.device))
    return prefill_shape((loaded.plan for loaded in models.values()), model.dtype.itemsize, free)


def timed_tasks(
    models: Mapping[str, LoadedModel], config: EfficiencyConfig, filled: tuple[int, int] | None
) -> dict[str, Callable[[LlamaForCausalLM], float]]:
    """What is timed, by name; with a `filled` prompt as it is served, too."""
    generator = torch.Generator().manual_seed(0)
    vocab = min(loaded.plan.geometry.vocab_size for loaded in models.values())
    prompt = torch.randint(vocab, (1, config.prompt_tokens), generator=generator)
    tasks: dict[str, Callable[[LlamaForCausalLM], float]] = {"prefill": lambda model: time_prefill(model, prompt)}
    for batch in BATCHES:
        start = torch.randint(vocab, (batch, config.decode_context), generator=generator)
        tasks[f"decode {batch}"] = lambda model, start=start: time_decode(model, start, config.new_tokens)
        if filled is not None:
            tasks[f"{GRAPH} {batch}"] = lambda model, start=start: time_served(model, start, config.new_tokens)
    if filled is not None:
        prompts = torch.randint(vocab, filled, generator=generator)
        tasks[FILLED] = lambda model: time_prefill(model, prompts)
    return tasks


def take_turns(
    models: Mapping[str, LoadedModel], tasks: Mapping[str, Callable[[LlamaForCausalLM], float]], repeats: int
) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Median seconds by role and task, and the most bytes that a task took beside what was held, by role.

    The prompt that fills the device is left out of the latter: it takes as much as there is.
    """
    seconds = {role: {task: [] for task in tasks} for role in models}
    rise = dict.fromkeys(models, 0)
    for repeat in tqdm(range(repeats + 1), desc="efficiency", disable=None, leave=False):
        for task, run in tasks.items():
            for role, loaded in models.items():
                device = str(loaded.model.device)
                reset_peak_memory(device)
                before = peak_memory(device)  # what is held
                taken = run(loaded.model)
                if repeat:  # the first round warms up
                    seconds[role][task].append(taken)
                    rise[role] = max(rise[role], 0 if task == FILLED else peak_memory(device) - before)
    medians = {role: {task: statistics.median(values) for task, values in rows.items()} for role, rows in seconds.items()}
    return medians, rise


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


def time_served(model: LlamaForCausalLM, start: torch.Tensor, new_tokens: int) -> float:
    """The same, of a captured graph."""
    with on(model.device):
        return _timed(decode_run(model, start, new_tokens), model.device)


def _timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of `run`: by events on CUDA, by the clock elsewhere."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        with on(device):
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def weight_bytes(model: LlamaForCausalLM, *, read: bool = False) -> int:
    """Bytes of all parameters, shared ones counted once; of those that are `read` for a token: an embedding that is not the
    head, too, is looked up."""
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight
    looked_up = read and embedding is not model.get_output_embeddings().weight
    return held - looked_up * embedding.numel() * embedding.element_size()


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
        *_served_rows(first),
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
    return "\n".join([*lines, *bounds(results)])


def _served_rows(first: Efficiency) -> list[tuple[str, Callable[[Efficiency], float], str]]:
    """What was measured on CUDA besides; the rows above are then what Python launches in that time."""
    if first.served_prompt is None:
        return []
    rows = [
        (f"decode, a graph (tokens/s, batch {batch})", lambda e, batch=batch: e.served_decode_rates[batch], "{:,.1f}")
        for batch in BATCHES
    ]
    count, length = first.served_prompt
    return [*rows, (f"prefill (tokens/s, {count} x {length})", lambda e: e.served_prefill_rate, "{:,.1f}")]


def bounds(results: Mapping[str, Efficiency]) -> list[str]:
    """What bounds the two rates: what each model needs for a token, how fast that went, and the ratio that follows."""
    first = next(iter(results.values()))
    if not first.decode_bytes:
        return []
    read, done, graph = [], [], " (a graph)" if first.served_prompt else ""
    for role, result in results.items():
        rate = (result.served_decode_rates or result.decode_rates)[1]
        at_most = first.decode_bytes / result.decode_bytes
        read.append(
            f"{role} {result.decode_bytes / 1e6:,.1f} MB at {result.decode_bytes * rate / 1e9:,.1f} GB/s ({at_most:.3f}x)"
        )
        rate, at_most = result.served_prefill_rate or result.prefill_rate, first.prefill_flops / result.prefill_flops
        speed = result.prefill_flops * rate / 1e12
        done.append(f"{role} {result.prefill_flops / 1e6:,.1f} MFLOPs at {speed:,.2f} TFLOP/s ({at_most:.3f}x)")
    return [
        f"bound of decode, batch 1{graph}, by bytes read for a token: " + ", ".join(read),
        "bound of prefill, by the work on a token: " + ", ".join(done),
    ]
