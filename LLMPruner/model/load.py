"""How a model is loaded from its source, and saved as our `.bin`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.errors import RunError
from LLMPruner.model.checkpoint import load_checkpoint, save_checkpoint
from LLMPruner.model.device import dtype_name, resolve_device, resolve_dtype
from LLMPruner.model.size import count_parameters
from LLMPruner.model.source import ModelSource, weight_files
from LLMPruner.model.tokenizer import load_tokenizer, quiet_transformers, tokenizer_files
from LLMPruner.plan import PruningPlan, removed_prefixes

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

    from LLMPruner.model.forward import LayerRunner
    from LLMPruner.model.store import ResidentStore

logger = logging.getLogger("LLMPruner")


@dataclass
class LoadedModel:
    """A model in memory with what it needs to be saved again."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    plan: PruningPlan
    provenance: dict[str, Any]

    @cached_property
    def store(self) -> ResidentStore:
        """The model's weights, as what prunes, measures and writes them asks for them."""
        from LLMPruner.model.store import ResidentStore

        return ResidentStore(self.model)

    @cached_property
    def runner(self) -> LayerRunner:
        """Runs the model layer by layer."""
        from LLMPruner.model.forward import LayerRunner

        return LayerRunner(self.store)


def load_model(
    source: ModelSource, *, dtype: str = "auto", device: str = "auto", tokenizer: PreTrainedTokenizerBase | None = None
) -> LoadedModel:
    """Load weights (and the tokenizer, unless given), in eval mode, on `device`.

    Raises RunError when the weights do not fit the config or, for our `.bin`, the plan.
    """
    place = resolve_device(device)
    precision = resolve_dtype(dtype, place)
    logger.info("loading %s as %s on %s", source.path, dtype_name(precision), place)
    load = {"bin": _load_bin, "gguf": _load_gguf, "hf": _load_directory}[source.kind]
    with quiet_transformers():
        model = load(source, precision).to(place).eval()
    count = count_parameters(model)
    if count != source.plan.total_params:
        raise RunError(f"{source.path} has {count:,} parameters where its config says {source.plan.total_params:,}")
    logger.info("loaded %s parameters", f"{count:,}")
    if "__provenance__" in source.meta:
        provenance = source.provenance
    else:
        provenance = {"base_model": str(source.path), "dense_parameters": count}
    return LoadedModel(model, tokenizer or load_tokenizer(source), source.plan, provenance)


def open_tensors(source: ModelSource) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors of a model that is no `.bin` one by one, without a tied head and without the zeros that stand for
    removed sublayers. Raises RunError when a file is unreadable."""
    from safetensors import SafetensorError, safe_open

    tied = source.geometry.tied_embeddings
    removed = removed_prefixes(source.plan)
    if source.kind == "gguf":
        with quiet_transformers():
            tensors = _load_gguf(source, resolve_dtype("float32", resolve_device("cpu"))).state_dict().items()
            yield from _untied(tied, tensors)
        return
    for path in weight_files(source):
        try:
            with safe_open(path, framework="pt") as handle:
                names = (name for name in handle.keys() if not name.startswith(removed))  # noqa: SIM118
                yield from _untied(tied, ((name, handle.get_tensor(name)) for name in names))
        except SafetensorError as error:
            raise RunError(f"{path} is damaged and cannot be read: {error}") from error


def _untied(tied: bool, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors without the head, where it is the embedding again."""
    return (pair for pair in tensors if not (tied and pair[0] == "lm_head.weight"))


def build_empty(config: Any, plan: PruningPlan) -> LlamaForCausalLM:
    """A LlamaForCausalLM on the meta device whose layers have the plan's shapes: weights are to be assigned to it."""
    import torch
    from transformers import LlamaForCausalLM

    from LLMPruner.families.slicing import shape_layer

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        for index, layer in enumerate(model.model.layers):
            shape_layer(layer, plan, index)
    return model


def assign_weights(model: LlamaForCausalLM, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> LlamaForCausalLM:
    """Give a meta-device model its weights (cast to `dtype`) and a fresh rotary table. Raises RunError on a mismatch."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    tied = model.config.tie_word_embeddings
    state = {name: tensor.to(dtype) for name, tensor in _untied(tied, tensors.items())}
    expected = {name: value.shape for name, value in _untied(tied, model.state_dict().items())}
    wrong = [name for name in expected.keys() | state.keys() if name not in state or state[name].shape != expected.get(name)]
    if wrong:
        name = min(wrong)
        found = tuple(state[name].shape) if name in state else "missing"
        raise RunError(
            f"the weights do not fit the plan: {name} is {found}, expected {tuple(expected.get(name, ())) or 'absent'}"
        )
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config=model.config)
    model.config.dtype = dtype
    return model.eval()


def save_model(path: Path, loaded: LoadedModel) -> None:
    """Write our `.bin`: weights (tied head once), config, plan, tokenizer, provenance."""
    model = loaded.model
    tensors = {name: _owned(tensor) for name, tensor in loaded.store.tensors()}
    meta = {
        "__config__": model.config.to_json_string(use_diff=False),
        "__generation_config__": model.generation_config.to_json_string(),
        "__plan__": loaded.plan.to_json(),
        "__tokenizer__": json.dumps(tokenizer_files(loaded.tokenizer)),
        "__provenance__": json.dumps(loaded.provenance),
    }
    save_checkpoint(path, tensors, meta)


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it owns all of its storage, else a copy: a view would save its whole base."""
    owns = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if owns else tensor.clone().contiguous()


def _load_directory(source: ModelSource, dtype: torch.dtype) -> LlamaForCausalLM:
    import safetensors
    from transformers import LlamaForCausalLM

    weight_files(source)  # a hub model's are downloaded here at the latest
    if source.config["model_type"] != "llama" or not source.plan.is_dense:
        return _load_export(source, dict(source.config), dtype)
    try:
        model, report = LlamaForCausalLM.from_pretrained(source.path, dtype=dtype, output_loading_info=True)
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise RunError(f"{source.path} cannot be loaded: {str(error).splitlines()[0]}") from error
    if report["missing_keys"]:  # transformers would go on with random weights
        raise RunError(f"{source.path} lacks weights: {min(report['missing_keys'])}")
    return model


def _load_export(source: ModelSource, settings: dict[str, Any], dtype: torch.dtype) -> LlamaForCausalLM:
    """A directory that LLMPruner.export wrote, or a Mistral: stock modules in the plan's shapes, no code of the directory's."""
    from transformers import GenerationConfig

    foreign = ("model_type", "architectures", "auto_map", "per_layer_config", "sliding_window", "torch_dtype", "dtype")
    foreign += ("removed_attention", "removed_mlp", "attention_output_bias", "mlp_output_bias", "transformers_version")
    config = _llama_config({name: value for name, value in settings.items() if name not in foreign})
    model = assign_weights(build_empty(config, source.plan), dict(open_tensors(source)), dtype)
    if (source.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.path)
    return model


def _llama_config(settings: dict[str, Any]) -> LlamaConfig:
    """A LlamaConfig, also of heads that do not divide the width: transformers 5 refuses those, so they are set afterwards."""
    from transformers import LlamaConfig

    heads = settings["num_attention_heads"]
    known = {
        "num_attention_heads": heads,
        "num_key_value_heads": settings.get("num_key_value_heads") or heads,
        "head_dim": settings.get("head_dim") or settings["hidden_size"] // heads,
    }
    config = LlamaConfig(**settings | dict.fromkeys(known, 1))
    for name, value in known.items():
        setattr(config, name, value)
    return config


def _load_gguf(source: ModelSource, dtype: torch.dtype) -> LlamaForCausalLM:
    """Dequantize through transformers, then rebuild: its own object is marked quantized and refuses to be cast or saved."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder, name = source.path.parent, source.path.name
    dequantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    settings = dequantized.config.to_dict()
    settings.pop("quantization_config", None)
    model = build_empty(LlamaConfig(**settings), source.plan)
    model = assign_weights(model, dequantized.state_dict(), dtype)
    model.generation_config = dequantized.generation_config
    return model


def _load_bin(source: ModelSource, dtype: torch.dtype) -> LlamaForCausalLM:
    from transformers import GenerationConfig

    tensors, meta = load_checkpoint(source.path)
    model = build_empty(_llama_config(json.loads(meta["__config__"])), source.plan)
    model = assign_weights(model, tensors, dtype)
    if "__generation_config__" in meta:
        model.generation_config = GenerationConfig(**json.loads(meta["__generation_config__"]))
    return model
