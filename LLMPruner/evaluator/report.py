"""A diagnosis as a person reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from LLMPruner.evaluator.damage import Damage
    from LLMPruner.evaluator.health import Diagnosis
    from LLMPruner.plan import Geometry


def report_text(diagnosis: Diagnosis) -> str:
    """The report a person reads: the verdict, the sizes of every layer, the findings."""
    errors = [finding for finding in diagnosis.findings if finding.severity == "error"]
    verdict = f"UNHEALTHY: {errors[0].where}: {errors[0].message}" if errors else "HEALTHY"
    if len(errors) > 1:
        verdict += f" (and {len(errors) - 1} more)"
    lines = [verdict, f"model: {diagnosis.path}"]
    if diagnosis.plan is not None:
        lines += _layer_lines(diagnosis, diagnosis.plan.geometry)
    lines += ["", "findings:"] + [f"  {f.severity:7s} {f.where}: {f.message}" for f in diagnosis.findings]
    return "\n".join(lines if diagnosis.findings else [*lines, "  none"]) + "\n"


def _layer_lines(diagnosis: Diagnosis, geometry: Geometry) -> list[str]:
    share = diagnosis.parameters / geometry.dense_params
    lines = [f"parameters: {diagnosis.parameters:,} ({share:.1%} of {geometry.dense_params:,})", ""]
    head = f"{'layer':>5}  {'KV groups':>9}  {'query heads':>11}  {'Q:KV':>6}  {'channels':>14}  {'kept':>6}"
    lines.append(head + _damage_columns(diagnosis.damage, None))
    for index, (layer, kept) in enumerate(zip(diagnosis.layers, diagnosis.kept, strict=True)):
        ratio = f"{layer.query_heads / layer.kv_heads:.3g}:1" if layer.kv_heads else "-"
        groups, channels = f"{layer.kv_heads:g} of {geometry.num_kv_heads}", f"{layer.channels} of {geometry.intermediate_size}"
        lines.append(
            f"{index:>5}  {groups:>9}  {layer.query_heads:>11g}  {ratio:>6}  {channels:>14}  {kept:>6.1%}"
            + _damage_columns(diagnosis.damage, index)
        )
    return lines


def _damage_columns(damage: Damage | None, index: int | None) -> str:
    """What a layer does to the stream beside the dense model, where it was measured; the titles for None."""
    if damage is None:
        return ""
    if index is None:
        return f"  {'cosine':>7}  {'distance':>8}  {'increase':>8}  {'longest token':>13}"
    return (
        f"  {damage.cosines[index]:>7.4f}  {damage.distances[index]:>8.3f}  {damage.increases[index]:>+8.3f}"
        f"  {damage.ratios[index]:>12.2f}x"
    )
