"""Text that the dense model writes itself: whole windows, the same for a seed, in the model's own words."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB, geometry_of, random_windows, tiny_model
from transformers import AddedToken, GenerationConfig
from transformers.cache_utils import DynamicLayer

from LLMPruner.data.self_text import _BufferedLayer, write_windows
from LLMPruner.evaluator.ppl import perplexity
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import load_model
from LLMPruner.model.source import find_model
from LLMPruner.plan import LayerPlan, PruningPlan


@pytest.fixture(scope="module")
def trained(trained_dir):
    return load_model(find_model(str(trained_dir), "--base_model"), dtype="float32")


def write(trained, **changes):
    return write_windows(trained.model, trained.tokenizer, **{"samples": 6, "seq_len": 24, "seed": 1} | changes)


def test_windows_are_whole_and_within_the_vocabulary(trained):
    written = write(trained)
    assert written.shape == (6, 24) and written.dtype == torch.int64
    assert written.min() >= 0 and written.max() < len(trained.tokenizer)


def test_a_seed_writes_the_same_text_and_another_seed_another(trained):
    assert torch.equal(write(trained), write(trained))
    assert not torch.equal(write(trained), write(trained, seed=2))


def test_attention_has_no_kernel_that_may_add_in_another_order(trained):
    before, seen = torch.backends.cuda.cudnn_sdp_enabled(), []
    hook = trained.model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    write(trained)
    hook.remove()
    assert set(seen) == {False} and torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize(
    "theirs",
    [{"max_new_tokens": 5}, {"do_sample": True, "temperature": 0.05, "top_p": 0.1}],
    ids=str,
)
def test_the_models_generation_config_is_not_read_and_stays(trained, monkeypatch, theirs):
    expected, config = write(trained), GenerationConfig(**theirs)
    monkeypatch.setattr(trained.model, "generation_config", config)
    assert torch.equal(write(trained), expected)
    assert trained.model.generation_config is config


class Tokenizer:
    """As much of a tokenizer as is read."""

    def __init__(self, known: int, special: range) -> None:
        """The later half of the special ones has no role, as reserved tokens have none."""
        self.known, self.all_special_ids = known, list(special[: len(special) // 2])
        self.added_tokens_decoder = {token: AddedToken("x", special=token in special) for token in [*special, 9]}

    def __len__(self) -> int:
        return self.known


@pytest.mark.parametrize("known", [10, 10**6])
def test_every_token_is_one_that_both_the_tokenizer_and_the_model_know_and_the_first_no_marker(trained, known):
    written = write_windows(trained.model, Tokenizer(known, range(4)), samples=40, seq_len=4, seed=0)
    assert written.max() < min(known, VOCAB)
    assert written[:, 0].min() >= 4 and len(written[:, 0].unique()) > 5


@torch.no_grad()
def test_every_token_is_drawn_from_the_models_own_distribution(trained):
    """The surprise of the text is what the model itself expects it to be: at another temperature it would be less or more."""
    written = write_windows(trained.model, Tokenizer(VOCAB, range(0)), samples=100, seq_len=24, seed=0)
    chances = trained.model(written[:, :-1].to(trained.model.device)).logits.log_softmax(-1).cpu()
    surprise = -chances.gather(-1, written[:, 1:].unsqueeze(-1)).sum()
    entropy = -(chances.exp() * chances).sum(-1)
    variance = (chances.exp() * chances.square()).sum(-1) - entropy.square()
    assert abs(surprise - entropy.sum()) < 4 * variance.sum().sqrt()


def test_an_end_of_text_is_a_token_like_others(trained, monkeypatch):
    frequent = write(trained)[:, 1:].flatten().mode().values.item()
    for config in (trained.model.config, trained.model.generation_config):
        monkeypatch.setattr(config, "eos_token_id", frequent)
    assert (write(trained)[:, 1:-1] == frequent).any()


def test_the_random_state_of_the_process_stays(trained):
    before = torch.random.get_rng_state()
    write(trained)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_more_windows_than_one_batch(trained, monkeypatch):
    monkeypatch.setattr("LLMPruner.data.self_text.BATCH_TOKENS", 4 * 24)
    assert write(trained).shape == (6, 24)


def test_the_text_is_the_models_own(trained):
    own, foreign = (perplexity(trained.model, windows) for windows in (write(trained), random_windows(6, 24)))
    assert own < VOCAB / 3 < foreign


def test_a_bos_token_begins_every_window_where_it_is_given(trained):
    written = write(trained, bos=0)
    assert written.shape == (6, 24) and not written[:, 0].any() and len(written[:, 1].unique()) > 1


@pytest.mark.parametrize("removed", [False, True])
def test_the_cache_in_buffers_of_its_final_size_gives_the_same_text_as_one_that_grows(trained, monkeypatch, removed):
    model = tiny_model()
    if removed:  # a layer without attention has no entry
        plan = PruningPlan.dense(geometry_of(model)).with_layer(1, LayerPlan((), (0, 1)))
        apply_plan(LayerRunner.of(model), plan)
    options = {"samples": 6, "seq_len": 24, "seed": 1}
    written, updated, update = [], [], _BufferedLayer.update
    monkeypatch.setattr(
        _BufferedLayer, "update", lambda self, *args, **kwargs: updated.append(1) or update(self, *args, **kwargs)
    )
    written.append(write_windows(model, trained.tokenizer, **options))
    assert len(updated) == 23 * (4 - removed), "of every token but the last, in every layer with attention"
    monkeypatch.setattr("LLMPruner.data.self_text.partial", lambda *_: DynamicLayer)
    written.append(write_windows(model, trained.tokenizer, **options))
    assert torch.equal(*written) and len(updated) == 23 * (4 - removed)
