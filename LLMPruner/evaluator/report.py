"""A diagnosis as a person reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    lines.append(head + _last_column(diagnosis, None))
    for index, layer in enumerate(diagnosis.layers):
        kept = {"attention": layer.kv_heads, "mlp": layer.channels}
        params = sum(count * geometry.unit_params(sublayer) for sublayer, count in kept.items())
        share = params / sum(geometry.sublayer_params(sublayer) for sublayer in kept)
        ratio = f"{layer.query_heads / layer.kv_heads:.3g}:1" if layer.kv_heads else "-"
        groups, channels = f"{layer.kv_heads:g} of {geometry.num_kv_heads}", f"{layer.channels} of {geometry.intermediate_size}"
        lines.append(
            f"{index:>5}  {groups:>9}  {layer.query_heads:>11g}  {ratio:>6}  {channels:>14}  {share:>6.1%}"
            + _last_column(diagnosis, index)
        )
    return lines


def _last_column(diagnosis: Diagnosis, index: int | None) -> str:
    """The ratio of the longest token where it was measured; its title for None."""
    if not diagnosis.stream_ratios:
        return ""
    return f"  {'longest token':>13}" if index is None else f"  {diagnosis.stream_ratios[index]:>12.2f}x"
