"""Is a model healthy? Findings about its weights, its shapes against the plan, and what it says."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from LLMPruner.config import CommonConfig
from LLMPruner.errors import DamagedError, RunError, UsageError
from LLMPruner.evaluator.damage import Damage
from LLMPruner.evaluator.generate import greedy, stop_tokens
from LLMPruner.families.family import Projection, Sublayer
from LLMPruner.memory import out_of_memory
from LLMPruner.model.checkpoint import load_checkpoint
from LLMPruner.model.device import resolve_device
from LLMPruner.model.load import opened
from LLMPruner.model.source import ModelSource, with_weights
from LLMPruner.model.tensors import StoredTensors
from LLMPruner.model.tokenizer import load_tokenizer
from LLMPruner.plan import PruningPlan, expected_shapes

if TYPE_CHECKING:
    from LLMPruner.model.load import LoadedModel

DEFAULTS = CommonConfig()
HUGE = 1e4  # weights of trained Llamas stay below 1e2; beyond this float16 activations overflow
TEXT = (
    "The river rises in the mountains and flows south through three towns before it reaches the sea. "
    "People have fished in it and built mills on its banks for many hundreds of years."
)
NEW_TOKENS = 16


@dataclass(frozen=True)
class Finding:
    """One observation: `error` makes the model unhealthy, `warning` does not, `info` is only told."""

    severity: str
    where: str
    message: str


@dataclass(frozen=True)
class LayerShape:
    """One layer as it lies in the file: query heads, KV heads, channels."""

    query_heads: float
    kv_heads: float
    channels: int


@dataclass(frozen=True)
class Diagnosis:
    """All that was found out about one model; `plan` is None where its file could not be read at all."""

    path: str
    parameters: int
    plan: PruningPlan | None
    layers: tuple[LayerShape, ...]
    findings: tuple[Finding, ...]
    damage: Damage | None = None  # beside the dense model

    @property
    def healthy(self) -> bool:
        """No finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    @property
    def kept(self) -> tuple[float, ...]:
        """The share of every layer's dense parameters that is left."""
        if self.plan is None:
            return ()
        units = self.plan.geometry.unit_params
        whole = sum(self.plan.geometry.sublayer_params(name) for name in ("attention", "mlp"))
        return tuple((layer.kv_heads * units("attention") + layer.channels * units("mlp")) / whole for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "path": self.path,
            "healthy": self.healthy,
            "parameters": self.parameters,
            "dense_parameters": None if self.plan is None else self.plan.geometry.dense_params,
            "layers": [asdict(layer) for layer in self.layers],
            "damage": None if self.damage is None else self.damage.as_dict(),
            "findings": [asdict(finding) for finding in self.findings],
        }


def unreadable(path: str, error: Exception) -> Diagnosis:
    """The diagnosis of a file that cannot be opened as a model."""
    return Diagnosis(path, 0, None, (), (Finding("error", "file", str(error)),))


def diagnose_weights(source: ModelSource) -> Diagnosis:
    """Check every tensor of a model, one at a time, without building the model. A damaged file is a finding too."""
    shapes, findings = {}, []
    try:
        source = with_weights(source)
        for name, tensor in _bin_tensors(source) if source.kind == "bin" else StoredTensors(source).items():
            shapes[name] = tuple(tensor.shape)
            findings += tensor_findings(name, tensor)
    except (RunError, DamagedError) as error:
        return unreadable(str(source.path), error)
    expected = expected_shapes(source.plan)
    findings += shape_findings(shapes, source.plan)
    count = sum(math.prod(shape) for name, shape in shapes.items() if name in expected)
    findings += _count_findings(count, source) + _tokenizer_findings(source)
    return Diagnosis(str(source.path), count, source.plan, layer_shapes(shapes, source.plan), tuple(findings))


def _bin_tensors(source: ModelSource) -> Iterator[tuple[str, torch.Tensor]]:
    with zipfile.ZipFile(source.path) as archive:
        damaged = archive.testzip()  # torch maps the file and never looks at the checksums
    if damaged is not None:
        raise RunError(f"{source.path} is damaged: {damaged} fails its checksum, copy or save it again")
    yield from load_checkpoint(source.path)[0].items()


def _tokenizer_findings(source: ModelSource) -> list[Finding]:
    """A tokenizer that cannot be used, or gives other ids than its own file."""
    try:
        highest = len(load_tokenizer(source)) - 1
    except (UsageError, RunError) as error:
        absent = source.kind == "hf" and not (source.path / "tokenizer.json").is_file()
        return [Finding("warning" if absent else "error", "tokenizer", str(error))]
    if highest < source.geometry.vocab_size:
        return []
    told = f"it gives ids up to {highest}, and {source.geometry.vocab_size} are embedded"
    return [Finding("warning", "tokenizer", told)]


def _count_findings(count: int, source: ModelSource) -> list[Finding]:
    """The parameter count against the plan, and against the record of the run that wrote the model."""
    findings, wanted = [], {"plan": source.plan.total_params}
    try:
        wanted["record"] = source.provenance.get("parameters", count)
    except (ValueError, AttributeError):
        findings.append(Finding("error", "record", "the provenance record is not readable"))
    for label, number in wanted.items():
        if number != count:
            findings.append(Finding("error", "model", f"{count:,} parameters, the {label} says {number:,}"))
    return findings


def tensor_findings(name: str, tensor: torch.Tensor) -> list[Finding]:
    """NaN, infinite, all-zero and huge (above HUGE) values of one tensor."""
    values = tensor.float()
    if values.isnan().any():
        return [Finding("error", name, f"{int(values.isnan().sum()):,} values are NaN")]
    if values.isinf().any():
        return [Finding("error", name, f"{int(values.isinf().sum()):,} values are infinite")]
    findings = []
    if not values.any():
        # a bias may well be zero; a weight matrix of zeros means a lost or emptied sublayer
        findings.append(Finding("warning" if name.endswith("bias") else "error", name, "all values are zero"))
    elif values.abs().max() > HUGE:
        findings.append(Finding("error", name, f"values up to {values.abs().max().item():.3g}, above {HUGE:g}"))
    return findings


def shape_findings(shapes: Mapping[str, tuple[int, ...]], plan: PruningPlan) -> list[Finding]:
    """Tensors that are missing, left over, or not of the plan's shape; and layers of broken Q:KV ratio."""
    expected = expected_shapes(plan)
    findings = []
    for name in sorted(expected.keys() | shapes.keys()):
        if name not in shapes:
            findings.append(Finding("error", name, "is missing"))
        elif name not in expected:
            findings.append(Finding("error", name, "is not part of the model that the config describes"))
        elif shapes[name] != expected[name]:
            findings.append(Finding("error", name, f"has shape {shapes[name]}, the plan says {expected[name]}"))
    for index, layer in enumerate(layer_shapes(shapes, plan)):
        if layer.query_heads != layer.kv_heads * plan.geometry.q_per_kv:
            ratio = f"{layer.query_heads:g}:{layer.kv_heads:g}"
            findings.append(Finding("error", f"layer {index}", f"Q:KV heads are {ratio}, not {plan.geometry.q_per_kv}:1"))
    return findings


def layer_shapes(shapes: Mapping[str, tuple[int, ...]], plan: PruningPlan) -> tuple[LayerShape, ...]:
    """Heads and channels of every layer as the tensors say, 0 where one is missing."""
    geometry, table = plan.geometry, plan.geometry.table
    query, key = table.attention.inputs[:2]

    def rows(index: int, sublayer: Sublayer, projection: Projection) -> int:
        name = f"{table.layers}.{index}.{sublayer.attribute}.{projection.name}.weight"
        return (shapes.get(name) or (0,))[0]

    return tuple(
        LayerShape(
            rows(index, table.attention, query) / geometry.head_dim,
            rows(index, table.attention, key) / geometry.head_dim,
            rows(index, table.mlp, table.mlp.inputs[0]),
        )
        for index in range(geometry.num_layers)
    )


def with_forward(diagnosis: Diagnosis, source: ModelSource, common: CommonConfig = DEFAULTS) -> Diagnosis:
    """The diagnosis with the forward test added; where the weights are broken it is not run: they may not even load."""
    if not diagnosis.healthy:
        found = [Finding("info", "forward", "not run, because the weights are broken")]
    else:
        resolve_device(common.device)  # a device this machine lacks is a wrong command, not an illness
        try:
            with opened(source, common) as loaded:
                found = diagnose_forward(loaded)
        except Exception as error:  # whatever breaks while a model loads and runs is what a diagnosis is for
            if out_of_memory(error):  # but for what the machine lacks
                raise
            found = [Finding("error", "forward", f"{type(error).__name__}: {error}")]
    return replace(diagnosis, findings=(*diagnosis.findings, *found))


@torch.no_grad()
def diagnose_forward(loaded: LoadedModel) -> list[Finding]:
    """Run the model on a short text: finite, better than guessing, and the same with the KV cache as without."""
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = torch.tensor([tokenizer(TEXT).input_ids[: loaded.plan.geometry.max_positions - NEW_TOKENS]])
    runner = loaded.runner
    loss = runner.head.losses(runner.layers(runner.embed(ids)), ids).item() / (ids.shape[1] - 1)
    if not math.isfinite(loss):
        return [Finding("error", "forward", f"the loss on a short text is {loss}")]
    chance = math.log(loaded.plan.geometry.vocab_size)
    findings = [Finding("info", "forward", f"PPL {math.exp(loss):.2f} on a text of {ids.shape[1]} tokens")]
    if loss > chance:
        findings.append(Finding("error", "forward", f"loss {loss:.2f} is worse than guessing ({chance:.2f} nats a token)"))
    if not runner.store.resident:
        return [*findings, Finding("info", "generation", "not run: the weights are on disk, every token would read them all")]
    prompt = ids[:, : min(12, ids.shape[1])].to(runner.device)
    cached, plain = (
        greedy(model, prompt, NEW_TOKENS, stops=stop_tokens(model), use_cache=use_cache) for use_cache in (True, False)
    )
    if not torch.equal(cached, plain):
        # in low precision two equally likely tokens may swap places, which is no defect
        severity = "error" if model.dtype == torch.float32 else "warning"
        findings.append(Finding(severity, "generation", "greedy tokens differ with and without the KV cache"))
    findings.append(Finding("info", "generation", repr(tokenizer.decode(cached[0]))))
    return findings
