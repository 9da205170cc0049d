"""A model that is always served with a BOS token keeps more of itself where calibration begins with one as well."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
from conftest import geometry_of, make_text, tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from LLMPruner.config import CommonConfig, PruneConfig
from LLMPruner.data.windows import load_windows, prune_windows
from LLMPruner.importance.budget import make_budget
from LLMPruner.importance.criteria import score_units
from LLMPruner.model.forward import LayerRunner
from LLMPruner.stages import steps

SEQ_LEN, BOS = 32, 0


@pytest.fixture(scope="module")
def served(tokenizer) -> PreTrainedTokenizerFast:
    """The suite's tokenizer as Llama-3's is: it adds BOS to what it reads."""
    adding = copy.deepcopy(tokenizer.backend_tokenizer)
    adding.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=adding, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def trained(served):
    """A model that never saw a text without BOS."""
    ids = torch.tensor(served(make_text(300, seed=0)).input_ids[1:])
    text = ids[: len(ids) // (SEQ_LEN - 1) * (SEQ_LEN - 1)].view(-1, SEQ_LEN - 1)
    windows = torch.cat([torch.full((len(text), 1), BOS), text], 1)
    model, generator = tiny_model().train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        batch = windows[torch.randint(len(windows), (16,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def served_ppl(model, tokenizer, data_dir) -> float:
    """PPL of the test text in windows that begin with BOS."""
    windows = load_windows(tokenizer, "wikitext2", "test", seq_len=SEQ_LEN, data_dir=str(data_dir), bos=BOS)
    return model(input_ids=windows, labels=windows).loss.exp().item()


def test_calibrating_as_the_model_is_served_costs_less_of_its_perplexity(trained, served, data_dir):
    geometry = geometry_of(trained)

    def pruned_ppl(wanted: str, seed: int) -> float:
        settings = {"round_to": 4, "channel_importance_samples": 64, "calibration_seq_len": SEQ_LEN, "calibration_bos": wanted}
        config = PruneConfig(0.4, prune_mlp=True, **settings)
        common = CommonConfig(seed=seed, data_dir=str(data_dir))
        windows = prune_windows(served, config, common, analyzes=False, calibrates=True)
        assert (windows.repair[:, 0] == BOS).all() == (wanted == "auto")
        runner = LayerRunner.of(copy.deepcopy(trained))
        units = score_units(runner, geometry, "taylor", windows=windows.calibration, seed=seed)
        plan = steps.plan_by_scores(make_budget(geometry, config), config, [1.0] * 4, units)
        steps.apply(runner, plan, windows.repair, config, common)
        return served_ppl(runner.store.model, served, data_dir)

    dense, seeds = served_ppl(trained, served, data_dir), (1, 2, 3, 4, 5)
    with_bos, without = ([pruned_ppl(wanted, seed) for seed in seeds] for wanted in ("auto", "off"))
    assert dense < statistics.median(with_bos) < statistics.median(without), (with_bos, without)
    assert max(with_bos) < max(without)
