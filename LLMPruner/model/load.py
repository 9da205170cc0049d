"""How a model is loaded from its source, and saved as our `.bin`."""

from __future__ import annotations

import gc
import json
import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.config import CommonConfig
from LLMPruner.errors import RunError, UsageError, one_line
from LLMPruner.families.family import rope_settings
from LLMPruner.memory import available_memory
from LLMPruner.model.checkpoint import save_checkpoint
from LLMPruner.model.device import dtype_name, resolve_device, resolve_dtype
from LLMPruner.model.fit import Streaming, streaming
from LLMPruner.model.size import count_parameters
from LLMPruner.model.source import ModelSource, with_weights
from LLMPruner.model.tensors import StoredTensors
from LLMPruner.model.tokenizer import load_tokenizer, quiet_transformers, tokenizer_files
from LLMPruner.plan import Geometry, PruningPlan

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from LLMPruner.model.forward import LayerRunner
    from LLMPruner.model.store import Store
    from LLMPruner.model.streamed import StreamedStore

logger = logging.getLogger("LLMPruner")

# What a config says of an export's layers, of how its windows slide, and of how it was saved: the plan and the family know.
FOREIGN = ("model_type", "architectures", "auto_map", "per_layer_config", "layer_types", "torch_dtype", "dtype")
FOREIGN += ("removed_attention", "removed_mlp", "attention_output_bias", "mlp_output_bias", "transformers_version")
FOREIGN += ("attn_implementation", "_attn_implementation", "text_config", "return_dict", "use_return_dict")


@dataclass
class LoadedModel:
    """A model with what it needs to be saved again; the weights of a streamed one are in its store alone."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: PruningPlan
    provenance: dict[str, Any]
    streamed: StreamedStore | None = None

    @cached_property
    def store(self) -> Store:
        """The model's weights, as what prunes, measures and writes them asks for them."""
        from LLMPruner.model.store import ResidentStore

        return self.streamed or ResidentStore(self.model)

    @cached_property
    def runner(self) -> LayerRunner:
        """Runs the model layer by layer."""
        from LLMPruner.model.forward import LayerRunner
        from LLMPruner.model.hidden import affordable

        free = available_memory(str(self.store.device))
        return LayerRunner(self.store, batch_tokens=affordable(self.plan.geometry, self.model.dtype, free))


def load_model(
    source: ModelSource,
    *,
    dtype: str = "auto",
    device: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    stream: Streaming | None = None,
) -> LoadedModel:
    """Load weights (and the tokenizer, unless given), in eval mode, on `device`; with `stream` they stay on disk.

    Raises RunError when the weights do not fit the config or, for our `.bin`, the plan.
    """
    place = resolve_device(device)
    precision = resolve_dtype(dtype, place)
    how = "loading" if stream is None else "streaming"
    logger.info("%s %s as %s on %s", how, source.path, dtype_name(precision), place)
    source, store = with_weights(source), None
    with quiet_transformers():
        model = empty_model(source)
        if stream is None:
            model = assign_weights(model, StoredTensors(source).items(), precision).to(place)
        else:
            store = _streamed(model, source, precision, place, stream)
    count = count_parameters(model)
    if count != source.plan.total_params:
        raise RunError(f"{source.path} has {count:,} parameters where its config says {source.plan.total_params:,}")
    logger.info("%s %s parameters", "loaded" if stream is None else "streams", f"{count:,}")
    if "__provenance__" in source.meta:
        provenance = source.provenance
    else:
        provenance = {"base_model": str(source.path), "dense_parameters": count}
    return LoadedModel(model, tokenizer or load_tokenizer(source), source.plan, provenance, store)


def check_loads(source: ModelSource) -> None:
    """Raise UsageError, before a weight is read, for a model that `load_model` would refuse."""
    with quiet_transformers():
        empty_model(with_weights(source))


@contextmanager
def opened(
    source: ModelSource, common: CommonConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[LoadedModel]:
    """A model to be looked at and not changed, loaded or streamed as `common` says; gone from memory afterwards."""
    with tempfile.TemporaryDirectory(prefix="llmpruner.") as folder:
        gc.collect()  # the model before may refer to itself: without this, two could be in memory at once
        stream = streaming(source, common, Path(folder))
        yield load_model(source, dtype=common.dtype, device=common.device, tokenizer=tokenizer, stream=stream)


def _streamed(
    model: PreTrainedModel, source: ModelSource, dtype: torch.dtype, device: torch.device, stream: Streaming
) -> StreamedStore:
    """The store of an empty model, whose parameters then say in what precision it computes."""
    from LLMPruner.model.finished import FinishedLayers
    from LLMPruner.model.streamed import StreamedStore

    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.tie_weights()
    model.config.dtype = dtype
    finished = FinishedLayers(stream.folder)
    return StreamedStore(model.eval(), StoredTensors(source), device, finished, limit=stream.limit)


def _untied(tied: bool, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors without the head, where it is the embedding again."""
    return (pair for pair in tensors if not (tied and pair[0] == "lm_head.weight"))


def empty_model(source: ModelSource) -> PreTrainedModel:
    """The stock model of the source on the meta device, with its generation settings and its rotary table.

    Everything that a config decides happens here, before a weight is read. Raises UsageError for what transformers refuses.
    """
    try:
        model = build_empty(model_config(source), source.plan)
        model.generation_config = _generation_config(source, model)
    except UsageError:
        raise
    except Exception as error:  # its validators, its tables and its modules raise kinds of their own
        raise UsageError(f"transformers does not take the config of {source.path}: {one_line(error)}") from error
    return model


def model_config(source: ModelSource) -> PretrainedConfig:
    """The config of the family's stock model, as the weights and the plan are: full attention, no padding token out of range.

    Heads that do not divide the width, which transformers 5 refuses, are set afterwards.
    """
    from transformers import AutoConfig

    geometry, settings = source.geometry, {name: value for name, value in source.config.items() if name not in FOREIGN}
    if _out_of_range(settings.get("pad_token_id"), geometry):
        settings["pad_token_id"] = None
    _check_numbers(source, settings)
    settings |= {name: None if name == geometry.table.slides[-1] else False for name in geometry.table.slides}
    settings |= {"max_position_embeddings": geometry.max_positions, "tie_word_embeddings": geometry.tied_embeddings}
    heads = {
        "num_attention_heads": geometry.num_heads,
        "num_key_value_heads": geometry.num_kv_heads,
        "head_dim": geometry.head_dim,
    }
    config = AutoConfig.for_model(geometry.family, **settings | dict.fromkeys(heads, 1))
    for name, value in heads.items():
        setattr(config, name, value)
    return config


def _out_of_range(token: Any, geometry: Geometry) -> bool:
    """Whether a padding token has no row in the embedding, which would look for it; padding is never used."""
    return isinstance(token, int) and not 0 <= token < geometry.vocab_size


def _check_numbers(source: ModelSource, settings: Mapping[str, Any]) -> None:
    """Raise UsageError where a number spoils every result, or where positions that end at a window were to scale rotations."""
    rope = rope_settings(settings)
    numbers = {"rms_norm_eps": settings.get("rms_norm_eps", 1e-6), "rope_theta": rope["rope_theta"]}
    for name, value in numbers.items():
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise UsageError(f"{source.path} has {name} = {value!r} in its config: it must be a positive number")
    cut = (settings.get("max_position_embeddings") or 0) > source.geometry.max_positions
    if cut and rope["rope_type"] not in ("default", "linear", "llama3"):
        raise UsageError(f"{source.path} attends in a sliding window and scales its rotary frequencies: this is not supported")


def build_empty(config: PretrainedConfig, plan: PruningPlan) -> PreTrainedModel:
    """The stock model of a config on the meta device, but for its rotary table, with layers of the plan's shapes: weights are
    to be assigned to it."""
    import torch
    from transformers import AutoModelForCausalLM

    from LLMPruner.families.slicing import shape_layer

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        for index, layer in enumerate(model.get_submodule(plan.geometry.table.layers)):
            shape_layer(layer, plan, index)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model


def assign_weights(model: PreTrainedModel, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> PreTrainedModel:
    """Give a meta-device model its weights, cast to `dtype`. Raises RunError on a mismatch."""
    tied = model.config.tie_word_embeddings
    state = {name: tensor.to(dtype) for name, tensor in _untied(tied, tensors)}
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
    model.config.dtype = dtype
    return model.requires_grad_(False).eval()


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


def _generation_config(source: ModelSource, model: PreTrainedModel) -> GenerationConfig:
    """What the model came with, else what its config says."""
    from transformers import GenerationConfig

    if source.kind == "bin" and "__generation_config__" in source.meta:
        return GenerationConfig(**json.loads(source.meta["__generation_config__"]))
    if source.kind == "hf" and (source.path / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(source.path)
    return model.generation_config
