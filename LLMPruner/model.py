"""How a model is loaded from its source and saved; device, dtype, parameter counts."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.checkpoint import load_checkpoint, save_checkpoint
from LLMPruner.config import ExportConfig
from LLMPruner.errors import RunError, UsageError
from LLMPruner.plan import PruningPlan, removed_prefixes
from LLMPruner.source import ModelSource, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

logger = logging.getLogger("LLMPruner")

DTYPES = ("auto", "float32", "bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass
class LoadedModel:
    """A model in memory with what it needs to be saved again."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    plan: PruningPlan
    provenance: dict[str, Any]


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer alone, so that data can be checked before any weight is read."""
    from transformers import AutoTokenizer

    with _quiet_transformers():
        if source.kind == "gguf":
            return AutoTokenizer.from_pretrained(source.path.parent, gguf_file=source.path.name)
        if source.kind == "hf":
            if not (source.path / "tokenizer.json").is_file():
                raise UsageError(f"{source.path} has no tokenizer.json: save the model's fast tokenizer beside its weights")
            try:
                return AutoTokenizer.from_pretrained(source.path)
            except Exception as error:  # each broken file raises its own kind
                raise UsageError(f"{source.path} has no usable tokenizer: {str(error).splitlines()[0]}") from error
        with tempfile.TemporaryDirectory() as folder:
            for name, text in json.loads(source.meta["__tokenizer__"]).items():
                if name not in TOKENIZER_FILES:
                    raise RunError(f"{source.path} carries an unexpected tokenizer file: {name}")
                Path(folder, name).write_text(text, encoding="utf-8")
            return AutoTokenizer.from_pretrained(folder)


def load_model(
    source: ModelSource, *, dtype: str = "auto", device: str = "auto", tokenizer: PreTrainedTokenizerBase | None = None
) -> LoadedModel:
    """Load weights (and the tokenizer, unless given), in eval mode, on `device`.

    Raises RunError when the weights do not fit the config or, for our `.bin`, the plan.
    """
    place = resolve_device(device)
    precision = resolve_dtype(dtype, place)
    logger.info("loading %s as %s on %s", source.path, str(precision).removeprefix("torch."), place)
    load = {"bin": _load_bin, "gguf": _load_gguf, "hf": _load_directory}[source.kind]
    with _quiet_transformers():
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
        with _quiet_transformers():
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

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        for index, layer in enumerate(model.model.layers):
            _shape_attention(layer, plan, index)
            _shape_mlp(layer, plan, index)
    return model


def _shape_attention(layer: torch.nn.Module, plan: PruningPlan, index: int) -> None:
    from torch import nn

    from LLMPruner.removed import RemovedAttention

    geometry, groups = plan.geometry, plan.kv_counts[index]
    if not groups:
        layer.self_attn = RemovedAttention()
        return
    queries, keys = groups * geometry.group_width, groups * geometry.head_dim
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        setattr(layer.self_attn, name, nn.Linear(geometry.hidden_size, rows, bias=geometry.attention_bias))
    layer.self_attn.o_proj = nn.Linear(queries, geometry.hidden_size, bias=plan.attention_output_bias(index))


def _shape_mlp(layer: torch.nn.Module, plan: PruningPlan, index: int) -> None:
    from torch import nn

    from LLMPruner.removed import RemovedMLP

    geometry, width = plan.geometry, plan.channel_counts[index]
    if not width:
        layer.mlp = RemovedMLP()
        return
    for name in ("gate_proj", "up_proj"):
        setattr(layer.mlp, name, nn.Linear(geometry.hidden_size, width, bias=geometry.mlp_bias))
    layer.mlp.down_proj = nn.Linear(width, geometry.hidden_size, bias=plan.mlp_output_bias(index))
    layer.mlp.intermediate_size = width


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
    tensors = {
        name: _owned(tensor.detach()) for name, tensor in _untied(model.config.tie_word_embeddings, model.state_dict().items())
    }
    meta = {
        "__config__": model.config.to_json_string(use_diff=False),
        "__generation_config__": model.generation_config.to_json_string(),
        "__plan__": loaded.plan.to_json(),
        "__tokenizer__": json.dumps(_tokenizer_files(loaded.tokenizer)),
        "__provenance__": json.dumps(loaded.provenance),
    }
    save_checkpoint(path, tensors, meta)


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it owns all of its storage, else a copy: a view would save its whole base."""
    owns = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if owns else tensor.clone().contiguous()


def versions() -> dict[str, str]:
    """The libraries a result depends on."""
    import platform

    import torch
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def stored_dtype(source: ModelSource) -> str:
    """The precision that a model's weights are stored in; float32 for a quantized GGUF, which is dequantized."""
    name = str(source.config.get("dtype") or source.config.get("torch_dtype") or "float32").removeprefix("torch.")
    return name if name in DTYPES else "float32"


def export_bytes(params: int, export: ExportConfig, dtype: str, device: str) -> int:
    """An upper estimate of the size of all exports of a model whose dense form has `params` parameters."""
    types = ["float32" if form == "gguf" and export.gguf_type == "f32" else dtype for form in export.formats]
    return sum(checkpoint_bytes(params, name, device) for name in types)


def checkpoint_bytes(params: int, dtype: str, device: str) -> int:
    """An upper estimate of our `.bin`'s size: the weights, and 32 MB for tokenizer and headers.

    Raises UsageError for a device this machine lacks.
    """
    return params * resolve_dtype(dtype, resolve_device(device)).itemsize + (32 << 20)


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters, shared tensors counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU. Raises UsageError for a device this machine lacks."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise ValueError("meta tensors hold no data")
        torch.empty(0, device=device)
    except Exception as error:  # torch raises RuntimeError, AssertionError and others for one and the same thing
        raise UsageError(f"--device {name} is not available here: use cpu, cuda, cuda:N, mps or auto") from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and on CPUs with bfloat16 instructions, float32 on others, where bfloat16 is slower."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.type != "cpu":
        return torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def _load_directory(source: ModelSource, dtype: torch.dtype) -> LlamaForCausalLM:
    import safetensors
    from transformers import LlamaForCausalLM

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


def _tokenizer_files(tokenizer: Any) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {name: Path(folder, name).read_text("utf-8") for name in TOKENIZER_FILES if Path(folder, name).is_file()}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hold back transformers' progress bars and notices while it loads: the log has one line instead."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
