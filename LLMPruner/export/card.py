"""The model card of an export: where the model comes from, what was removed, what it scores, how it loads. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from LLMPruner.plan import PruningPlan

if TYPE_CHECKING:
    from LLMPruner.model.load import LoadedModel


def model_card(loaded: LoadedModel, layout: PruningPlan, measured: dict[str, Any], *, own_code: bool) -> str:
    """README.md of an exported directory; `layout` is the plan as written, `measured` PPL results by role.

    `own_code`: the directory brings its model class.
    """
    plan = loaded.plan
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [pruned, structured-pruning]\n---",
        f"# Pruned Llama, {plan.total_params:,} parameters",
        _summary(loaded, layout),
        "## Loading\n" + _loading(plan, layout, own_code),
        "## Provenance\n" + _provenance(loaded.provenance),
        "## Measured perplexity\n" + _perplexity(measured),
        "## What each layer keeps\n" + _layers(plan),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(loaded: LoadedModel, layout: PruningPlan) -> str:
    plan, geometry = loaded.plan, loaded.plan.geometry
    dense = loaded.provenance.get("dense_parameters", geometry.dense_params)
    lines = [
        f"Of {dense:,} parameters {dense - plan.total_params:,} ({1 - plan.total_params / dense:.1%}) were removed: whole KV "
        f"groups (a KV head with its {geometry.q_per_kv} query heads) and MLP channels."
    ]
    padding = layout.total_params - plan.total_params
    if padding:
        lines.append(
            f"This export holds {padding:,} zeros beside them ({padding / plan.total_params:.1%} more, {layout.total_params:,} "
            "in all), which change no result but cost memory and time."
        )
    if plan.adds_bias:
        lines.append("Output projections of pruned sublayers have a bias that the dense model has not (bias repair).")
    return "\n".join(lines)


def _loading(plan: PruningPlan, layout: PruningPlan, own_code: bool) -> str:
    if own_code:
        return (
            "Layers differ in width, so the directory brings its model class, two short files over transformers' own:\n\n"
            "```python\nAutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
            "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n```\n\n"
            "vLLM: `vllm serve folder --trust-remote-code`. Where `LLMPruner` is installed, `import LLMPruner.export` makes "
            "the flag needless."
        )
    text = "A stock model: every loader takes it, without a flag."
    if layout.total_params > plan.total_params:
        text += " All layers are padded to the widest; the `hf` export has every layer at its own width."
    return text


def _provenance(provenance: dict[str, Any]) -> str:
    settings = provenance.get("settings") or {}
    rows = {
        "base model": provenance.get("base_model"),
        "command": provenance.get("command"),
        "calibration": " ".join(str(value) for value in (provenance.get("calibration") or {}).values()),
        "importance": settings.get("importance"),
        "allocation": settings.get("pruning_strategy"),
        "repair": settings.get("repair"),
        "epochs of blockwise distillation": provenance.get("distill_epochs"),
        "seed": provenance.get("seed"),
        "versions": ", ".join(f"{name} {version}" for name, version in (provenance.get("versions") or {}).items()),
    }
    if "finetune" in provenance:
        rows["fine-tuning"] = provenance["finetune"].get("command")
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | `{value}` |" for name, value in rows.items() if value not in (None, "")]
    return "\n".join(lines)


def _perplexity(measured: dict[str, Any]) -> str:
    if not any(measured.values()):
        return "Not measured by the run that wrote this export."
    lines = ["| model | corpus | split | windows | tokens a window | PPL |", "|---|---|---|---|---|---|"]
    for role, results in measured.items():
        for row in results:
            ppl = "not finite" if row["ppl"] is None else f"{row['ppl']:.2f}"
            lines.append(f"| {role} | {row['corpus']} | {row['split']} | {row['windows']} | {row['seq_len']} | {ppl} |")
    return "\n".join(lines)


def _layers(plan: PruningPlan) -> str:
    geometry = plan.geometry
    lines = [f"| layer | KV groups of {geometry.num_kv_heads} | channels of {geometry.intermediate_size} |", "|---|---|---|"]
    for index, (groups, channels) in enumerate(zip(plan.kv_counts, plan.channel_counts, strict=True)):
        lines.append(f"| {index} | {groups or 'removed'} | {channels or 'removed'} |")
    return "\n".join(lines)
