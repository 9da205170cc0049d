"""The stages of a job with their costs, in order: the formulas stand beside the stages. Plans are not known yet, so every
sublayer is taken to lose the same share.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from LLMPruner import parallel
from LLMPruner.cost import Cost, Setup, Work
from LLMPruner.data.corpora import CORPORA, load_text
from LLMPruner.data.mixture import SELF, windows_by_part
from LLMPruner.data.training import HELD_OUT_WINDOWS
from LLMPruner.importance import criteria, layer_analyzer
from LLMPruner.importance.budget import Budget
from LLMPruner.methods import healing_cost
from LLMPruner.model import size

if TYPE_CHECKING:
    from LLMPruner.stages.job import PruneJob

CACHE_TOKENS = 32768  # written together, as data/self_text.py, which imports transformers
TEST_CHARACTERS, TOKEN_CHARACTERS = 1_290_000, 4  # of a test split that is not at hand: WikiText-2's; of a token


def setup_of(job: PruneJob, budget: Budget, itemsize: int, device: str, *, resident: bool) -> Setup:
    """The job's model on a device, pruned evenly to its budget."""
    geometry = job.source.geometry
    share = budget.target / max(1, sum(part.size for part in budget.sublayers))
    kept = {}
    for name, columns in (("attention", geometry.num_heads * geometry.head_dim), ("mlp", geometry.intermediate_size)):
        count = sum(part.kind == name for part in budget.sublayers)
        kept[name] = max(1, round(columns * (1 - share * count / geometry.num_layers)))
    types = {"float32": 4, "bfloat16": 2, "float16": 2}
    stored = types[size.stored_dtype(job.source)]
    return Setup(geometry, itemsize, stored, **kept, resident=resident, cpu=device == "cpu", processes=parallel.count())


def stages(job: PruneJob, budget: Budget, setup: Setup) -> tuple[Cost, ...]:
    """The costs of all stages of `job`, in their order."""
    config, evaluation, found = job.prune, job.evaluation, [loading(setup, job)]
    tests = [_test_tokens(name, job) // evaluation.seq_len for name in evaluation.datasets]
    windows = max(1, sum(min(evaluation.samples or count, count) for count in tests) // len(tests))

    def measured(label: str, *, pruned: bool = True) -> Cost:
        from LLMPruner.evaluator import ppl

        return ppl.cost(setup, label, windows, evaluation.seq_len, len(tests), pruned=pruned)

    if job.test_original:
        found.append(measured("original", pruned=False))
    if job.analyzes:
        method, count = config.layer_importance_method, config.layer_importance_samples
        found.append(layer_analyzer.cost(setup, method, count, config.layer_importance_seq_len))
    if config.pruning_strategy == "search":
        from LLMPruner.importance.search import search

        found.append(search.cost(setup, config, len(budget.sublayers)))
    else:
        found.append(criteria.cost(setup, config.importance, config.channel_importance_samples, config.calibration_seq_len))
    if job.writes:
        found.append(writing(setup, config.self_samples, config.calibration_seq_len))
    epochs = {"epochs": config.distill_epochs, "model_epochs": config.distill_model_epochs, "last": config.distill_last}
    rows = config.repair_windows + job.writes * config.self_samples
    found.append(healing_cost.cost(setup, config.repair, rows, config.calibration_seq_len, **epochs))
    if config.pruning_strategy == "search":
        held_out = sum(config.search_windows) * config.search_seq_len
        work = setup.forward(held_out, config.search_seq_len, pruned=True)
        found.append(replace(measured("check"), stage="check", work=work))
    if job.save:
        found.append(size.save_cost(setup))
    if job.test_pruned or job.finetune is not None:
        found.append(measured("pruned"))
    if job.finetune is not None:
        found += [training(setup, job), *([size.save_cost(setup)] * job.save), measured("finetuned")]
    return (*found, *([size.export_cost(setup, job.export)] if job.export.formats else []))


def loading(setup: Setup, job: PruneJob) -> Cost:
    """What loading costs, and the text for a fine-tuning that the dense model writes meanwhile."""
    cost, config = size.load_cost(setup), job.finetune
    own = 0 if config is None else windows_by_part(config).get(SELF, 0)
    if not own:
        return cost
    text = writing(setup, own + HELD_OUT_WINDOWS, config.seq_len)
    return replace(cost, work=cost.work + text.work, device=max(cost.device, text.device), head=True)


def writing(setup: Setup, samples: int, seq_len: int) -> Cost:
    """What text that the dense model writes costs (data/self_text.py): every token reads all weights and its cache once.

    Rough: products of a few rows are bound by the memory, and counted by the bytes they read.
    """
    geometry, together = setup.geometry, min(samples, max(1, CACHE_TOKENS // seq_len))
    steps = -(-samples // together) * (seq_len - 1)
    cache = 2 * together * seq_len * geometry.num_kv_heads * geometry.head_dim * setup.itemsize
    work = setup.forward(samples * seq_len, 1) + setup.head_work(samples * seq_len)
    bytes_ = steps * (setup.weights() + geometry.num_layers * cache // 2)
    work += Work(traffic=bytes_, calls=60 * steps * geometry.num_layers)
    return Cost("write", work, geometry.num_layers * cache + 12 * together * geometry.vocab_size, head=True)


def training(setup: Setup, job: PruneJob) -> Cost:
    """What fine-tuning costs: rough. Forward and back, of full fine-tuning to the weights too, with float32 Adam's moments."""
    config, params = job.finetune, setup.weights(pruned=True) // setup.itemsize
    tokens, full = config.samples * config.epochs * config.seq_len, config.method == "full"
    work = setup.forward(tokens, config.seq_len, pruned=True) + setup.head_work(tokens, gradient=True)
    once = setup.forward(tokens, config.seq_len, pruned=True).matmul
    work += Work(back=once * (2 if full else 1))
    if config.distill.distill:  # the dense model's way forward, beside the student or before
        work += setup.forward(tokens, config.seq_len) + setup.head_work(tokens)
    steps = config.samples * config.epochs // (config.batch_size * config.grad_accum)
    batch = config.batch_size * config.seq_len
    work += Work(traffic=full * 40 * params * steps)
    held = setup.activations(batch, gradient=True) * setup.geometry.num_layers + batch * setup.geometry.vocab_size * 12
    return Cost("train", work, held + full * 16 * params, pruned=True, head=True)


def _test_tokens(name: str, job: PruneJob) -> int:
    """About as many tokens as the corpus's test split has; what is not on this machine is taken to be WikiText-2's."""
    common = job.common
    here = name not in CORPORA or (common.data_dir is not None and Path(common.data_dir, CORPORA[name].folder).is_dir())
    characters = len(load_text(name, "test", common.data_dir, common.text_format)) if here else TEST_CHARACTERS
    return characters // TOKEN_CHARACTERS
