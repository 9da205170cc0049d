"""A GGUF file as a model: its config in transformers' words, and its tensors under transformers' names. No torch.

What a file says beyond what is read here makes it another model, so an unknown setting or tensor is refused. Source of the
keys: the GGUF specification (github.com/ggml-org/ggml/blob/master/docs/gguf.md) and llama.cpp's own converter.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.errors import DamagedError, UsageError
from LLMPruner.families.gguf import ARCHITECTURES, tensor_name
from LLMPruner.families.llama import FAMILIES
from LLMPruner.model.weights import check_shapes
from LLMPruner.plan import Geometry, PruningPlan, expected_shapes

if TYPE_CHECKING:
    import numpy
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.gguf_reader import ReaderTensor

# Settings of an architecture, without its name, by the key of config.json that says the same.
SETTINGS = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
# Settings that change nothing, or that must have the value that follows from the others.
IMPLIED = {"attention.value_length": "head_dim", "rope.dimension_count": "head_dim"}
WITHOUT_MEANING = ("tensor_data_layout", "rope.scaling.type", "expert_count", "expert_used_count")  # where they say "none" or 0
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_CHUNK = 1 << 16  # values dequantized at once: what is computed on the way fits a core's cache


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file, or all shards of one, with what it says of its model."""

    path: Path
    fields: Mapping[str, Any]
    shards: tuple[GGUFReader, ...]

    @cached_property
    def tensors(self) -> dict[str, ReaderTensor]:
        """Every tensor by the name that the file gives it."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    def tokenizer_fields(self) -> dict[str, Any]:
        """Everything that it says of its tokenizer."""
        return {name: field.contents() for name, field in self.shards[0].fields.items() if name.startswith("tokenizer.")}

    @property
    def architecture(self) -> str:
        """Its `general.architecture`."""
        return self.fields["general.architecture"]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its settings as a `config.json` would word them. Raises UsageError for a setting that is not understood."""
        prefix, kind = f"{self.architecture}.", ARCHITECTURES[self.architecture].family
        own = {name.removeprefix(prefix): value for name, value in self.fields.items() if name.startswith(prefix)}
        own = {name: _alike(value) for name, value in own.items()}
        config = {SETTINGS[name]: value for name, value in own.items() if name in SETTINGS}
        for name in ("attention.layer_norm_rms_epsilon", "context_length"):
            if not isinstance(own.get(name), int | float) or not own[name] > 0:
                raise DamagedError(f"{self.path} has no usable {prefix}{name}: copy the model again")
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        if not (isinstance(heads, int) and isinstance(hidden, int) and heads > 0):
            raise UsageError(f"{self.path} is not a usable {self.architecture}: its heads and widths differ between layers")
        config.setdefault("head_dim", own.get("rope.dimension_count") or hidden // heads)
        config.setdefault("num_key_value_heads", heads)
        config.setdefault("rope_theta", 10000.0)  # llama.cpp's own default
        for name, value in own.items():
            understood = name in SETTINGS or value in (0, "none") and name in WITHOUT_MEANING
            if not (understood or value == config.get(IMPLIED.get(name, ""))):
                raise UsageError(
                    f"{self.path} has {prefix}{name} = {value}, which cannot be read from a GGUF file here: "
                    "pass the Hugging Face directory instead"
                )
        tensors = self.tensors
        if "token_embd.weight" not in tensors:
            raise DamagedError(f"{self.path} is damaged: it has no token_embd.weight")
        config.setdefault("vocab_size", int(tensors["token_embd.weight"].shape[1]))
        tied = "output.weight" not in tensors
        special = {
            f"{name}_token_id": self.fields[f"tokenizer.ggml.{name}_token_id"]
            for name in ("bos", "eos")
            if f"tokenizer.ggml.{name}_token_id" in self.fields
        }
        return {"model_type": kind, **config, **special, "tie_word_embeddings": tied, **self._biases(kind)}

    def _biases(self, kind: str) -> dict[str, bool]:
        """Which biases the tensors have, where the family's config says it."""
        if FAMILIES[kind].attention.output.bias != "attention_bias":
            return {}
        return {"attention_bias": "blk.0.attn_q.bias" in self.tensors, "mlp_bias": "blk.0.ffn_up.bias" in self.tensors}

    def shapes(self, plan: PruningPlan) -> dict[str, tuple[int, ...]]:
        """Shapes by transformers' names, and by their own where they have none there."""
        names = {tensor_name(name): name for name in expected_shapes(plan)}
        return {
            names.get(name, name): tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self.tensors.items()
        }

    def names(self, plan: PruningPlan) -> list[str]:
        """transformers' names of the tensors of `plan`."""
        return list(expected_shapes(plan))

    def value(self, name: str, geometry: Geometry) -> numpy.ndarray:
        """The tensor that transformers calls `name`, dequantized to float32. Raises KeyError where the file has none."""
        import numpy

        tensor = self.tensors[tensor_name(name)]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        value = numpy.require(dequantized(tensor.data, tensor.tensor_type), numpy.float32, "W").reshape(shape)
        rotated = any(part.rotary and f".{part.name}." in name for part in geometry.table.attention.inputs)
        return halves(value, geometry.head_dim) if rotated and ARCHITECTURES[self.architecture].pairs else value


def _alike(value: Any) -> Any:
    """One value for all layers, where a setting lists the same for each."""
    return value[0] if isinstance(value, list) and value and all(entry == value[0] for entry in value) else value


def halves(value: numpy.ndarray, head_dim: int) -> numpy.ndarray:
    """Rows of q or k `(heads * head_dim, ...)` from llama.cpp's rotary order (pairs) to transformers' (halves)."""
    heads = value.shape[0] // head_dim
    return value.reshape(heads, head_dim // 2, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def dequantized(data: numpy.ndarray, kind: GGMLQuantizationType) -> numpy.ndarray:
    """The values of a tensor as the package's `dequantize` gives them, in float32 but for their shape.

    It works on 16 rows at a time, whatever their length, and joins copies: chunks of one size are three times as fast.
    """
    import numpy
    from gguf import GGML_QUANT_SIZES, dequantize

    data, (length, size) = numpy.asarray(data), GGML_QUANT_SIZES[kind]  # each view of a memmap would cost microseconds
    if data.dtype != numpy.uint8:
        return dequantize(data, kind)
    blocks, step = data.reshape(-1, size), _CHUNK // length
    values = numpy.empty((len(blocks), length), numpy.float32)
    for start in range(0, len(blocks), step):
        chunk = blocks[start : start + step]
        values[start : start + step] = dequantize(chunk.reshape(1, -1), kind).reshape(-1, length)
    return values


def inspect_gguf(path: Path) -> tuple[GGUFModel, PruningPlan]:
    """Open a GGUF and all its shards. Raises UsageError for what is no such model, DamagedError where tensors are missing."""
    model = open_gguf(path)
    architecture = model.fields.get("general.architecture")
    if architecture == "deci":
        raise UsageError(f"{path} is for llama.cpp: pass the .bin it was exported from, or the hf export")
    if architecture not in ARCHITECTURES:
        raise UsageError(
            f"{path} is of no family that this tool reads: its architecture is {architecture!r}, "
            f"known are {', '.join(ARCHITECTURES)}"
        )
    if model.fields.get(f"{architecture}.expert_count"):
        raise UsageError(f"{path} is a mixture of experts: this tool prunes dense models only")
    if "rope_freqs.weight" in model.tensors or model.fields.get(f"{architecture}.rope.scaling.type", "none") != "none":
        raise UsageError(
            f"{path} has scaled rotary frequencies (Llama 3.1 and later), which cannot be read from a GGUF file here: "
            "pass the Hugging Face directory instead"
        )
    plan = PruningPlan.dense(Geometry.from_config(model.config))
    _check_types(model)
    check_shapes(path, model.shapes(plan), plan)
    return model, plan


def _check_types(model: GGUFModel) -> None:
    """Raise UsageError for a tensor of a type that the package gguf does not dequantize."""
    import numpy
    from gguf import GGML_QUANT_SIZES, dequantize

    for kind, name in {tensor.tensor_type: name for name, tensor in model.tensors.items()}.items():
        try:
            dequantize(numpy.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=numpy.uint8), kind)
        except NotImplementedError as error:
            raise UsageError(f"{model.path} stores {name} as {kind.name}, which is not read here: pass another file") from error


@cache
def _reader() -> type[GGUFReader]:
    """The package's reader with arrays read in one pass: it makes four views of the file for each entry of a vocabulary."""
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
            """Size in bytes of a field's value, its parts, which of them are data, and its types.

            Of an array each text is a part, and all numbers are one. Raises an error for what cannot be read.
            """
            if self.byte_order != "I":  # which `dequantize` does not know
                raise ValueError("its numbers are in the byte order of another machine")
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = struct.unpack_from("=IQ", self.data, orig_offs)
            start = orig_offs + struct.calcsize("=IQ")
            if kind == GGUFValueType.STRING:
                parts, end = _texts(memoryview(self.data), start, count)
            elif kind in self.gguf_scalar_to_np:
                parts = [self._get(start, self.gguf_scalar_to_np[kind], count)]
                end = start + count * parts[0].itemsize
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            if end > len(self.data):
                raise ValueError("it ends within an array")
            return end - orig_offs, parts, list(range(len(parts))), [GGUFValueType.ARRAY, GGUFValueType(kind)]

    return Reader


def _texts(data: memoryview, start: int, count: int) -> tuple[list[memoryview], int]:
    """`count` texts, each after its length in eight bytes, and where they end. Raises struct.error at the end of `data`."""
    length, parts, end = struct.Struct("=Q"), [], start
    for _ in range(count):
        begin = end + length.size
        end = begin + length.unpack_from(data, end)[0]
        parts.append(data[begin:end])
    return parts, end


def open_gguf(path: Path) -> GGUFModel:
    """The file with its settings; of a split file all shards, which must lie beside the first."""

    def read(place: Path) -> GGUFReader:
        try:
            return _reader()(place)
        except Exception as error:  # the reader raises whatever numpy raises on a truncated file
            raise DamagedError(f"{place} is not a readable GGUF file: {error}") from error

    first = read(path)
    fields = {
        name: value.contents()
        for name, value in first.fields.items()
        if not name.startswith("tokenizer.") or name.endswith("_token_id")
    }
    count, shards = fields.get("split.count", 1), [first]
    if not isinstance(count, int):
        raise DamagedError(f"{path} is damaged: its split.count is {count!r}")
    if count > 1:
        parts = SHARD.fullmatch(path.name)
        if parts is None or fields.get("split.no", 0) != 0:
            raise UsageError(f"{path} is one of {count} parts of a split GGUF: pass the first, NAME-00001-of-{count:05d}.gguf")
        for number in range(2, count + 1):
            place = path.with_name(f"{parts[1]}-{number:05d}-of-{count:05d}.gguf")
            if not place.is_file():
                raise DamagedError(f"{path} is split into {count} files and lacks {place.name} beside it: copy the model again")
            shards.append(read(place))
            stated = [shards[-1].fields[key].contents() for key in ("split.no", "split.count") if key in shards[-1].fields]
            if stated != [number - 1, count]:
                raise DamagedError(f"{place} is not part {number} of {count} of the split model {path}: copy the model again")
    names = [tensor.name for shard in shards for tensor in shard.tensors]
    if len(set(names)) < len(names):
        raise DamagedError(f"{path} has {max(names, key=names.count)} twice: copy the model again")
    return GGUFModel(path, fields, tuple(shards))
