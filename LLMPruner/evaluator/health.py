"""Is a model healthy? Findings about its weights, its shapes against the plan, and what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from LLMPruner.checkpoint import load_checkpoint
from LLMPruner.forward import LayerRunner
from LLMPruner.model import ModelSource, open_tensors
from LLMPruner.plan import PruningPlan

if TYPE_CHECKING:
    from LLMPruner.model import LoadedModel

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
    """All that was found out about one model."""

    path: str
    parameters: int
    plan: PruningPlan
    layers: tuple[LayerShape, ...]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """No finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "path": self.path,
            "healthy": self.healthy,
            "parameters": self.parameters,
            "dense_parameters": self.plan.geometry.dense_params,
            "layers": [asdict(layer) for layer in self.layers],
            "findings": [asdict(finding) for finding in self.findings],
        }


def diagnose_weights(source: ModelSource) -> Diagnosis:
    """Check every tensor of a model, one at a time, without building the model. Raises RunError if it cannot be read."""
    shapes, findings, recorded = {}, [], None
    if source.kind == "bin":
        tensors, meta = load_checkpoint(source.path)
        recorded = json.loads(meta["__provenance__"]).get("parameters")
        stream: Iterator[tuple[str, torch.Tensor]] = iter(tensors.items())
    else:
        stream = open_tensors(source)
    for name, tensor in stream:
        shapes[name] = tuple(tensor.shape)
        findings += tensor_findings(name, tensor)
    findings += shape_findings(shapes, source.plan)
    count = sum(math.prod(shape) for shape in shapes.values())
    expected = source.plan.total_params
    for label, number in (("plan", expected), ("record", recorded)):
        if number is not None and number != count:
            findings.append(Finding("error", "model", f"{count:,} parameters, the {label} says {number:,}"))
    return Diagnosis(str(source.path), count, source.plan, layer_shapes(shapes, source.plan), tuple(findings))


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
    """Tensors that are missing, extra, or not of the plan's shape; and layers whose Q:KV ratio is broken."""
    expected = expected_shapes(plan)
    findings = []
    for name in sorted(expected.keys() | shapes.keys()):
        if name not in shapes:
            findings.append(Finding("error", name, "is missing"))
        elif name not in expected:
            findings.append(Finding("warning", name, "is not part of a Llama"))
        elif shapes[name] != expected[name]:
            findings.append(Finding("error", name, f"has shape {shapes[name]}, the plan says {expected[name]}"))
    for index, layer in enumerate(layer_shapes(shapes, plan)):
        if layer.query_heads != layer.kv_heads * plan.geometry.q_per_kv:
            ratio = f"{layer.query_heads:g}:{layer.kv_heads:g}"
            findings.append(Finding("error", f"layer {index}", f"Q:KV heads are {ratio}, not {plan.geometry.q_per_kv}:1"))
    return findings


def expected_shapes(plan: PruningPlan) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Llama pruned to `plan`, a tied head left out."""
    geometry = plan.geometry
    hidden = geometry.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (geometry.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not geometry.tied_embeddings:
        shapes["lm_head.weight"] = (geometry.vocab_size, hidden)
    for index, (groups, width) in enumerate(zip(plan.kv_counts, plan.channel_counts, strict=True)):
        queries, keys = groups * geometry.group_width, groups * geometry.head_dim
        attention = {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
        }
        mlp = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        for kind, group, bias in (("self_attn", attention, geometry.attention_bias), ("mlp", mlp, geometry.mlp_bias)):
            for name, shape in group.items():
                shapes[f"model.layers.{index}.{kind}.{name}.weight"] = shape
                if bias:
                    shapes[f"model.layers.{index}.{kind}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{index}.{name}.weight"] = (hidden,)
    return shapes


def layer_shapes(shapes: Mapping[str, tuple[int, ...]], plan: PruningPlan) -> tuple[LayerShape, ...]:
    """Heads and channels of every layer as the tensors say, 0 where one is missing."""
    rows = lambda index, name: shapes.get(f"model.layers.{index}.{name}.weight", (0,))[0]  # noqa: E731
    width = plan.geometry.head_dim
    return tuple(
        LayerShape(rows(i, "self_attn.q_proj") / width, rows(i, "self_attn.k_proj") / width, rows(i, "mlp.gate_proj"))
        for i in range(plan.geometry.num_layers)
    )


@torch.no_grad()
def diagnose_forward(loaded: LoadedModel) -> list[Finding]:
    """Run the model on a short text: finite, better than guessing, and the same with the KV cache as without."""
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = torch.tensor([tokenizer(TEXT).input_ids[: loaded.plan.geometry.max_positions - NEW_TOKENS]])
    runner = LayerRunner(model)
    loss = runner.losses(runner.layers(runner.embed(ids)), ids).item() / (ids.shape[1] - 1)
    if not math.isfinite(loss):
        return [Finding("error", "forward", f"the loss on a short text is {loss}")]
    chance = math.log(loaded.plan.geometry.vocab_size)
    findings = [Finding("info", "forward", f"PPL {math.exp(loss):.2f} on a text of {ids.shape[1]} tokens")]
    if loss > chance:
        findings.append(Finding("error", "forward", f"loss {loss:.2f} is worse than guessing ({chance:.2f} nats a token)"))
    prompt = ids[:, : min(12, ids.shape[1])].to(runner.device)
    cached, plain = (_generate(model, prompt, use_cache=use_cache) for use_cache in (True, False))
    if not torch.equal(cached, plain):
        # in low precision two equally likely tokens may swap places, which is no defect
        severity = "error" if model.dtype == torch.float32 else "warning"
        findings.append(Finding(severity, "generation", "greedy tokens differ with and without the KV cache"))
    findings.append(Finding("info", "generation", repr(tokenizer.decode(cached[0]))))
    return findings


def report_text(diagnosis: Diagnosis) -> str:
    """The report a person reads."""
    plan, geometry = diagnosis.plan, diagnosis.plan.geometry
    errors = [finding for finding in diagnosis.findings if finding.severity == "error"]
    verdict = "HEALTHY" if diagnosis.healthy else f"UNHEALTHY: {errors[0].where}: {errors[0].message}"
    kept = diagnosis.parameters / geometry.dense_params
    lines = [
        verdict,
        f"model: {diagnosis.path}",
        f"parameters: {diagnosis.parameters:,} ({kept:.1%} of {geometry.dense_params:,})",
    ]
    lines += ["", "layer  KV groups  query heads  Q:KV  channels        kept"]
    for index, layer in enumerate(diagnosis.layers):
        params = layer.kv_heads * geometry.group_params + layer.channels * geometry.channel_params
        share = params / (geometry.attention_params + geometry.mlp_params)
        ratio = f"{layer.query_heads / layer.kv_heads:g}:1" if layer.kv_heads else "-"
        lines.append(
            f"{index:5d}  {layer.kv_heads:g} of {geometry.num_kv_heads:<4d}  {layer.query_heads:11g}  {ratio:>4}  "
            f"{layer.channels:5d} of {geometry.intermediate_size:<6d} {share:5.1%}"
        )
    lines += ["", "findings:"] + [f"  {f.severity:7s} {f.where}: {f.message}" for f in diagnosis.findings]
    return "\n".join(lines if diagnosis.findings else [*lines, "  none"]) + "\n"


def _generate(model: torch.nn.Module, prompt: torch.Tensor, *, use_cache: bool) -> torch.Tensor:
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
    )
