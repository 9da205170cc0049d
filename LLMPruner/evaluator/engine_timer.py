"""Times models in an engine that serves them: llama.cpp or vLLM. A script of its own, for the engine's own environment.

    python engine_timer.py JOB.json RESULT.json

It needs the engine and nothing of this package. The models take turns, so that a machine that slows down slows all; medians
count. What is decoded is fixed, so that no sampling is timed.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Seconds = dict[str, float]  # by phase: prefill, decode
Engine = Callable[[list[int], int], Seconds]  # a model that is loaded: a prompt, and how many tokens are decoded


class LlamaCpp:
    """A GGUF in llama.cpp, by llama-cpp-python. Raises ValueError where llama.cpp refuses it."""

    package = "llama_cpp"

    def __init__(self, path: str, job: Mapping[str, Any]) -> None:
        from llama_cpp import Llama

        length, threads = job["prompt_tokens"] + job["new_tokens"], job["threads"]
        options = {"n_threads": threads, "n_threads_batch": threads, "n_batch": job["prompt_tokens"]}
        self.model = Llama(path, n_ctx=length, n_gpu_layers=-1 if job.get("gpu") else 0, verbose=False, **options)
        trained = int(next(value for name, value in self.model.metadata.items() if name.endswith(".context_length")))
        if length > trained:
            raise ValueError(f"it was trained on {trained} positions, fewer than the {length} tokens asked for")
        self.vocab = self.model.n_vocab()

    def __call__(self, prompt: list[int], new_tokens: int) -> Seconds:
        """How long the prompt takes, and so many tokens after it, one at a time."""
        self.model.reset()

        def decode() -> None:
            for _ in range(new_tokens):
                self.model.eval(prompt[:1])

        return {"prefill": timed(lambda: self.model.eval(prompt)), "decode": timed(decode)}


class Vllm:
    """An exported directory in vLLM, as `vllm bench latency` calls it: batch 1, no prefix of a turn before is reused."""

    package = "vllm"

    def __init__(self, path: str, job: Mapping[str, Any]) -> None:
        from vllm import LLM

        self.model = LLM(
            path,
            trust_remote_code=path in job["trusted"],
            max_model_len=job["prompt_tokens"] + job["new_tokens"] + 1,
            gpu_memory_utilization=0.9 / len(job["models"]),
            enable_prefix_caching=False,
            max_num_seqs=1,
        )
        self.vocab = self.model.llm_engine.model_config.get_vocab_size()

    def __call__(self, prompt: list[int], new_tokens: int) -> Seconds:
        """How long the prompt with its first token takes, and so many tokens after that."""
        first = timed(lambda: self._generate(prompt, 1))
        return {"prefill": first, "decode": timed(lambda: self._generate(prompt, 1 + new_tokens)) - first}

    def _generate(self, prompt: list[int], tokens: int) -> None:
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self.model.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)


ENGINES = {"llama.cpp": LlamaCpp, "vllm": Vllm}


def timed(work: Callable[[], Any]) -> float:
    """Seconds that the work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rates(models: Mapping[str, Engine], vocab: int, job: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Median tokens a second by model and phase, after a turn of each that is not counted.

    Raises ValueError where a phase is too short to be told from what is around it.
    """
    prompt = [(7919 * index) % vocab for index in range(1, job["prompt_tokens"] + 1)]  # the same numbers for all
    taken: dict[str, list[Seconds]] = {role: [] for role in models}
    for turn in range(job["repeats"] + 1):
        for role, model in models.items():
            seconds = model(prompt, job["new_tokens"])
            if turn:
                taken[role].append(seconds)
    found: dict[str, dict[str, float]] = {}
    for role, rows in taken.items():
        for phase, count in (("prefill", job["prompt_tokens"]), ("decode", job["new_tokens"])):
            median = statistics.median(row[phase] for row in rows)
            if median <= 0:
                raise ValueError(f"{phase} of {count} tokens is too short to be measured: time more tokens")
            found.setdefault(role, {})[phase] = count / median
    return found


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Rates by model and the engine's version, or the one sentence of why there are none."""
    kind = ENGINES[job["engine"]]
    models, role = {}, ""
    try:
        for role, path in job["models"].items():
            models[role] = kind(path, job)
        found = rates(models, min(model.vocab for model in models.values()), job)
    except ImportError as error:
        return {"error": f"it cannot be imported: {error}"}
    except ValueError as error:
        return {"error": f"it cannot run {role} {job['models'][role]}: {error}"}
    return {"version": sys.modules[kind.package].__version__, "rates": found}


def main(job: str, result: str) -> None:
    """Read the job, write the result: what engines print goes where it likes."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the models are files
    os.environ.setdefault(
        "VLLM_CPU_KVCACHE_SPACE", "1"
    )  # GB of each model's cache, where there is no GPU: batch 1 needs no more
    Path(result).write_text(json.dumps(run(json.loads(Path(job).read_text()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
