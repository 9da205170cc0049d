"""What stands beside exported weights: the model card (where they come from, what was removed, what they score, how they load),
and Ollama's Modelfile. Neither names a place on this machine. No torch.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from LLMPruner.errors import UsageError
from LLMPruner.plan import PruningPlan

if TYPE_CHECKING:
    from LLMPruner.model.load import LoadedModel

MARK = "# written by LLMPruner, replaced by its next export; a file without this line is left alone"
WEIGHTS = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".safetensors")


def model_card(loaded: LoadedModel, layout: PruningPlan, measured: dict[str, Any], *, form: str) -> str:
    """README.md of an exported directory, or the card beside a GGUF; `layout` is the plan as written, `measured` PPL by role.

    `form`: own (the directory brings its model class), stock, or the name of the GGUF file.
    """
    plan, record = loaded.plan, portable(loaded.provenance)
    removed = removed_parameters(loaded)
    parts = [
        _front_matter(record.get("base_repo"), gguf=form.endswith(".gguf"), pruned=removed > 0),
        f"# {'Pruned ' if removed else ''}{plan.geometry.table.model_type.capitalize()}, {plan.total_params:,} parameters",
        _summary(plan, layout, removed),
        "## Loading\n" + _loading(plan, layout, form),
        "## Provenance\n" + _provenance(record),
        "## Measured perplexity\n" + _perplexity(measured),
    ]
    if removed:
        parts.append("## What each layer keeps\n" + _layers(plan))
    return "\n\n".join(parts) + "\n"


def removed_parameters(loaded: LoadedModel) -> int:
    """By how many parameters the model is smaller than the dense one; of a uniform export the record knows that one's size."""
    return loaded.provenance.get("dense_parameters", loaded.plan.geometry.dense_params) - loaded.plan.total_params


def base_name(provenance: dict[str, Any]) -> str:
    """What the dense model is called, without its owner on the hub and the ending of a file."""
    name = str(portable(provenance).get("base_model") or "model").rsplit("/", 1)[-1]
    path = Path(name)
    return path.stem if path.suffix in WEIGHTS else name  # the dot of Llama-3.1-8B is no ending


def portable(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the last name of each path in the path's place: for what leaves this machine.

    `base_model` becomes a folder's or file's name or, with `base_repo` beside it, the id of what came from the hub.
    """
    found, base = _without_places(record), record.get("base_model")
    # a snapshot in the hub's cache is a folder whose own name is a hash
    hub = re.search(r"(?:^|[/\\])models--([^/\\]+?)--([^/\\]+)", str(base))
    repo = f"{hub[1]}/{hub[2]}" if hub else record.get("base_repo")
    if repo:
        found |= {"base_model": repo, "base_repo": repo}
    elif base:
        found["base_model"] = Path(base).name
    return found


def _without_places(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _without_places(part, name) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(part) for part in value]
    if not isinstance(value, str):
        return value
    return _portable_command(value) if key == "command" else _last_name(value)


def _last_name(text: str) -> str:
    return (Path(text).name or text) if Path(text).is_absolute() else text


def _portable_command(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:  # a record that was edited
        words = command.split()
    pairs = (word.partition("=") if word.startswith("-") else ("", "", word) for word in words)
    return shlex.join(flag + equals + _last_name(value) for flag, equals, value in pairs)


def _front_matter(repo: str | None, *, gguf: bool, pruned: bool) -> str:
    lines = ["---", MARK, f"library_name: {'gguf' if gguf else 'transformers'}", "pipeline_tag: text-generation"]
    if pruned:
        lines.append("tags: [pruned, structured-pruning]")
    if repo:
        lines.append(f"base_model: {repo}")
    return "\n".join([*lines, "---"])


def _summary(plan: PruningPlan, layout: PruningPlan, removed: int) -> str:
    dense = plan.total_params + removed
    lines = ["Nothing was removed: the model as it was read."]
    if removed:
        lines = [
            f"Of {dense:,} parameters {removed:,} ({removed / dense:.1%}) were removed: whole KV "
            f"groups (a KV head with its {plan.geometry.q_per_kv} query heads) and MLP channels."
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


def _loading(plan: PruningPlan, layout: PruningPlan, form: str) -> str:
    if form.endswith(".gguf"):
        return (
            f"llama.cpp: `llama-cli -m {form}`. Ollama, with the `Modelfile` beside it: `ollama create NAME -f Modelfile`.\n\n"
            f"Smaller, with llama.cpp's own tool: `{quantize_command(form)}`."
        )
    if form == "own":
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


def quantize_command(path: str) -> str:
    """The next step from a GGUF in 16 or 32 bits to K-quants, which llama.cpp's own tool writes."""
    small = path.removesuffix(".gguf") + "-Q4_K_M.gguf"
    return shlex.join(["llama-quantize", path, small, "Q4_K_M"])


def _provenance(record: dict[str, Any]) -> str:
    settings = record.get("settings") or {}
    rows = {
        "base model": record.get("base_model"),
        "command": record.get("command"),
        "calibration": " ".join(str(value) for value in (record.get("calibration") or {}).values()),
        "importance": settings.get("importance"),
        "allocation": settings.get("pruning_strategy"),
        "repair": settings.get("repair"),
        "epochs of blockwise distillation": record.get("distill_epochs"),
        "epochs of distillation by next-token distributions": record.get("distill_model_epochs"),
        "of only so many last layers": record.get("distill_last"),
        "share of the calibration text's next tokens in it": record.get("distill_labels"),
        "seed": record.get("seed"),
        "versions": ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items()),
    }
    if "finetune" in record:
        rows["fine-tuning"] = record["finetune"].get("command")
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


def beside(gguf: Path) -> tuple[Path, Path]:
    """The card and the Modelfile of a GGUF file."""
    return gguf.with_suffix(".md"), gguf.with_name("Modelfile")


def check_beside(gguf: Path) -> None:
    """Raise UsageError where a card or Modelfile that no export wrote stands in the place of the GGUF's own."""
    for place in beside(gguf):
        if place.is_symlink() or (place.exists() and not _is_ours(place)):
            raise UsageError(f"{place} was not written by an export, which would replace it: choose another folder")


def _is_ours(place: Path) -> bool:
    if not place.is_file():
        return False
    with open(place, "rb") as handle:
        return MARK.encode() in handle.read(4096).splitlines()


class ChatFormat(NamedTuple):
    """How a family of chat templates writes a turn; what ends one."""

    turn: str
    end: str

    def written(self, role: str, content: str) -> str:
        """One turn."""
        return self.turn.replace("ROLE", role).replace("CONTENT", content)

    @property
    def answer(self) -> str:
        """How the answer begins."""
        return self.written("assistant", "CONTENT").split("CONTENT")[0]


CHAT_FORMATS = (
    ChatFormat("<|im_start|>ROLE\nCONTENT<|im_end|>\n", "<|im_end|>"),  # ChatML
    ChatFormat("<|start_header_id|>ROLE<|end_header_id|>\n\nCONTENT<|eot_id|>", "<|eot_id|>"),  # Llama-3
)
PROBES = (
    (("user", "probe 1"),),
    (("system", "probe 2"), ("user", "probe 3")),
    (("user", "probe 4"), ("assistant", "probe 5"), ("user", "probe 6")),
    (("system", "probe 7"), ("user", "probe 8"), ("assistant", "probe 9"), ("user", "probe 10")),
)


def modelfile(gguf: str, tokenizer: Any, stops: list[str]) -> str:
    """Ollama's Modelfile for the file `gguf` beside it; `stops` are the tokens that end an answer.

    TEMPLATE stands there where the tokenizer's chat template is one whose every turn is known; else Ollama reads the GGUF's.
    """
    lines, found = [MARK, f"FROM ./{gguf}"], _chat_format(tokenizer)
    if found is not None:
        chat, system = found
        lines.append(f'TEMPLATE """{_go_template(chat, system)}"""')
        stops = [*stops, chat.end]
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if '"' not in stop and stop.isprintable()]
    return "\n".join(lines) + "\n"


def _go_template(chat: ChatFormat, system: str | None) -> str:
    """The format in Go's template language; `system` opens a conversation that brings no system prompt of its own."""
    default = "" if system is None else chat.written("system", system)
    if default:
        default = f'{{{{ if and (eq $i 0) (ne $m.Role "system") }}}}{default}{{{{ end }}}}'
    turn = chat.written("{{ $m.Role }}", "{{ $m.Content }}")
    return f"{{{{ range $i, $m := .Messages }}}}{default}{turn}{{{{ end }}}}{chat.answer}"


def _chat_format(tokenizer: Any) -> tuple[ChatFormat, str | None] | None:
    """The format that the chat template writes all PROBES in, and its system prompt where none is given; None for others."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or "tool" in template:  # Ollama serves tools by a template that says how
        return None
    try:
        rendered = [
            tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in probe], tokenize=False, add_generation_prompt=True
            )
            for probe in PROBES
        ]
    except Exception:  # a template may raise whatever it likes, for example where it allows no system prompt
        return None
    for chat in CHAT_FORMATS:
        bos = tokenizer.bos_token or ""  # Ollama and llama.cpp put it there themselves
        texts = rendered if chat.turn.startswith(bos) else [text.removeprefix(bos) for text in rendered]
        plain = ["".join(chat.written(*turn) for turn in probe) + chat.answer for probe in PROBES]
        default = _between(texts[0], chat.written("system", "CONTENT").split("CONTENT"), plain[0])
        opening = "" if default is None else chat.written("system", default)
        if texts == [text if probe[0][0] == "system" else opening + text for probe, text in zip(PROBES, plain, strict=True)]:
            return chat, default
    return None


def _between(text: str, turn: list[str], rest: str) -> str | None:
    """The content of the turn before `rest`; None where there is none, or none that Go's templates could hold as it is."""
    start, end = turn[0], turn[1] + rest
    content = text[len(start) : -len(end)] if text.startswith(start) and text.endswith(end) else None
    return None if content is None or any(mark in content for mark in ("{{", '"""', turn[1])) else content
