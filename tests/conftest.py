"""Tiny Llamas, a tiny tokenizer and a tiny corpus, made within the session: the tests need no download and no GPU."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from LLMPruner.data.training import TrainingRows, TrainingText
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import LoadedModel, load_model, save_model
from LLMPruner.model.source import find_model
from LLMPruner.plan import Geometry, LayerPlan, PruningPlan

torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it gives

# The same examples every time: a red build must mean a change, not a draw. Some requests are infeasible and are passed over.
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
settings.load_profile("suite")

VOCAB = 300

# Changes to `tiny_config`: the kinds of Llama that every step of pruning must treat alike.
ARCHITECTURES = {
    "gqa 4:1": {},
    "gqa 3:1": {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    "mha": {"num_key_value_heads": 8},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
}
each_architecture = pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)


def make_text(rows: int, seed: int) -> str:
    """Sentences of a small grammar with topics, so that a tiny model can learn something worth losing."""
    rng = random.Random(seed)
    topics = [
        (("cat", "dog", "bird"), ("chases", "sees", "likes"), ("mouse", "ball", "tree"), ("quickly", "often", "again")),
        (("king", "queen", "judge"), ("rules", "builds", "leaves"), ("city", "castle", "court"), ("slowly", "wisely", "today")),
        (
            ("river", "storm", "wind"),
            ("floods", "shakes", "crosses"),
            ("valley", "bridge", "field"),
            ("loudly", "twice", "daily"),
        ),
    ]
    lines = []
    for _ in range(rows):
        subjects, verbs, objects, adverbs = rng.choice(topics)
        sentences = [
            f"The {rng.choice(subjects)} {rng.choice(verbs)} the {rng.choice(objects)} {rng.choice(adverbs)} ."
            for _ in range(6)
        ]
        lines.append(" ".join(sentences))
    return "\n".join(lines) + "\n"


# Four layers with 4:1 query heads per KV head, of sizes that differ from one another.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def tiny_config(**changes) -> LlamaConfig:
    """The config of a Llama of SIZES, but for what `changes`."""
    return LlamaConfig(**SIZES | changes)


def tiny_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A random float32 model in eval mode; biases, where the config has them, are not zero."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def stock_model(model_class, config_class, changes) -> PreTrainedModel:
    """A random model of transformers' own, of SIZES but for `changes`; biases and norms are not those of a new one."""
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES | changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    return model


def geometry_of(model: LlamaForCausalLM) -> Geometry:
    """The sizes that the model's own config states."""
    return Geometry.from_config(model.config.to_dict())


def random_plan(geometry: Geometry, seed: int = 0) -> PruningPlan:
    """Random kept units; the first layer stays whole and the last keeps one KV group and one channel."""
    rng = random.Random(seed)

    def some(size: int) -> tuple[int, ...]:
        return tuple(sorted(rng.sample(range(size), rng.randint(1, size))))

    plan = PruningPlan.dense(geometry)
    for index in range(1, geometry.num_layers):
        plan = plan.with_layer(index, LayerPlan(some(geometry.num_kv_heads), some(geometry.intermediate_size)))
    last = LayerPlan((rng.randrange(geometry.num_kv_heads),), (rng.randrange(geometry.intermediate_size),))
    return plan.with_layer(geometry.num_layers - 1, last)


def random_windows(count: int = 5, seq_len: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token windows `(count, seq_len)`."""
    return torch.randint(VOCAB, (count, seq_len), generator=torch.Generator().manual_seed(seed))


def plain_text(windows: torch.Tensor, held_out: dict[str, torch.Tensor] | None = None) -> TrainingText:
    """Windows to train on, of one corpus, and others to validate on."""
    held_out = {name: TrainingRows.plain(rows) for name, rows in (held_out or {}).items()}
    parts = torch.zeros(len(windows), dtype=torch.int64)
    return TrainingText(TrainingRows.plain(windows), parts, dict.fromkeys(held_out or ["wikitext2"], 1.0), held_out)


def half_pruned(trained_dir: Path) -> LoadedModel:
    """The trained tiny model with half of two layers removed and nothing repaired."""
    loaded = load_model(find_model(str(trained_dir), "--model_path"), dtype="float32", device="cpu")
    plan = PruningPlan.dense(loaded.plan.geometry)
    for index in (0, 2):
        plan = plan.with_layer(index, LayerPlan((1,), tuple(range(0, 96, 3))))
    apply_plan(LayerRunner.of(loaded.model), plan)
    loaded.plan = plan
    return loaded


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A --data_dir with wikitext-2-raw and ptb, made of the small grammar."""
    folder = tmp_path_factory.mktemp("data")
    for corpus, splits in (("wikitext-2-raw", ("train", "validation", "test")), ("ptb", ("validation", "test"))):
        (folder / corpus).mkdir()
        for index, split in enumerate(splits):
            (folder / corpus / f"{split}.txt").write_text(make_text(300 if split == "train" else 60, seed=index))
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCAB tokens, trained on the small grammar."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([make_text(200, seed=0)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def trained_dir(tmp_path_factory, tokenizer) -> Path:
    """A HF directory with the tiny 4:1 model, trained for a few seconds so that its PPL means something."""
    model = tiny_model().train()
    ids = torch.tensor(tokenizer(make_text(300, seed=0)).input_ids)
    windows = ids[: len(ids) // 64 * 64].view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        batch = windows[torch.randint(len(windows), (16,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model_dir(tmp_path, tokenizer):
    """Saves a tiny model as a HF directory and returns its path."""

    def save(name="model", seed=0, **changes):
        folder = tmp_path / name
        tiny_model(seed, **changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def pruned_bin(tmp_path, tokenizer):
    """Prunes a tiny model at random, saves our .bin, and returns its path and the model."""

    def save(**changes):
        model = tiny_model(**changes)
        plan = random_plan(geometry_of(model))
        apply_plan(LayerRunner.of(model), plan)
        path = tmp_path / "pytorch_model.bin"
        save_model(path, LoadedModel(model, tokenizer, plan, {"base_model": "tiny", "seed": 1}))
        return path, model, plan

    return save
