"""Byte-level BPE tokenizers as GGUF words them: rules for splitting text by llama.cpp's names, and a tokenizer from a file.

transformers drops `tokenizer.ggml.pre` when it reads a GGUF, so that digits and blanks are split as GPT-2 did it, whatever the
model was trained with. Here the rule is what its name says, or the file is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.errors import DamagedError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What Llama-3 and Qwen2 split text by before their merges: the same but for digits, by threes or alone.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT, QWEN2_SPLIT = _SPLIT % r"\p{N}{1,3}", _SPLIT % r"\p{N}"

# Steps of a pre-tokenizer (as `rule` sees them) and llama.cpp's name for them.
PRE_TOKENIZERS = {
    (("ByteLevel", False, True),): "gpt-2",
    (("Digits", True), ("ByteLevel", False, True)): "smollm",
    (("Split", LLAMA3_SPLIT, "Isolated", False), ("ByteLevel", False, False)): "llama-bpe",
    (("Split", QWEN2_SPLIT, "Isolated", False), ("ByteLevel", False, False)): "qwen2",
}
# Other names that llama.cpp gives the same rule.
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
WHOLE_WORDS = ("llama-bpe",)  # tokenizers that take a word that is a token as it is, before any merge
ADDS_BOS = ("llama-bpe",)  # tokenizers that begin with BOS where the file does not say
NORMALIZERS = {"qwen2": "NFC"}  # what the published tokenizers do before; llama.cpp does not
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types


def pre_tokenizer_name(tokenizer: Any) -> str:
    """llama.cpp's name of the rule by which the tokenizer splits text before its merges. Raises UsageError for others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {}
    step = parts.get("pre_tokenizer") or {}
    name = PRE_TOKENIZERS.get(tuple(rule(step) for step in step.get("pretokenizers", [step])))
    normalizer, model = (parts.get("normalizer") or {}).get("type"), parts.get("model") or {}
    known = name is not None and normalizer in (None, NORMALIZERS.get(name)) and model.get("type") == "BPE"
    if known and bool(model.get("ignore_merges")) <= (name in WHOLE_WORDS):
        return name
    raise UsageError(
        "the tokenizer's rule for splitting text is none that GGUF has a name for here (Llama-3, Qwen2, SmolLM, GPT-2): "
        "choose the hf or padded export, and convert that with llama.cpp's own script"
    )


def rule(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides how a step of a tokenizer's pre-tokenizer splits text."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return kind, step.get("add_prefix_space", True), step.get("use_regex", True)
    if kind == "Digits":
        return kind, step.get("individual_digits", False)
    return kind, (step.get("pattern") or {}).get("Regex"), step.get("behavior"), step.get("invert", False)


def tokenizer_of_gguf(path: Path, read: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF whose `tokenizer.*` fields are `read`. Raises UsageError where its rule is not known here."""
    from transformers import PreTrainedTokenizerFast

    kind, name = read.get("tokenizer.ggml.model"), str(read.get("tokenizer.ggml.pre", "default"))
    name = ALIASES.get(name, name)
    if kind != "gpt2" or name not in PRE_TOKENIZERS.values():
        raise UsageError(
            f"{path} has a tokenizer of the kind {kind!r} that splits text as {name!r}, known are gpt2 with "
            f"{', '.join(sorted(PRE_TOKENIZERS.values()))}: pass the Hugging Face directory instead"
        )
    roles = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    tokens = dict(enumerate(read.get("tokenizer.ggml.tokens") or ()))
    special = {word: tokens.get(read.get(f"tokenizer.ggml.{role}_token_id")) for role, word in roles.items()}
    adds = {"bos": name in ADDS_BOS, "eos": False}
    adds = {role: read.get(f"tokenizer.ggml.add_{role}_token", value) for role, value in adds.items()}
    for role in (role for role, added in adds.items() if added and special[roles[role]] is None):
        raise DamagedError(f"{path} adds a {role.upper()} token that it does not name: copy the model again")
    try:
        backend = _backend(name, read, [special[roles[role]] if added else None for role, added in adds.items()])
    except Exception as error:  # whatever the library or a missing field raises
        raise DamagedError(f"{path} has a tokenizer that cannot be built ({error}): copy the model again") from error
    given = {word: token for word, token in special.items() if token is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **given)
    if "tokenizer.chat_template" in read:
        tokenizer.chat_template = read["tokenizer.chat_template"]
    return tokenizer


def _backend(name: str, read: Mapping[str, Any], around: list[str | None]) -> Any:
    """The pipeline: added tokens, splitting, byte-level BPE, and the tokens put `around` a text (BOS, EOS; None: not)."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    tokens = read["tokenizer.ggml.tokens"]
    types = read.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    merges = [tuple(merge.split(" ", 1)) for merge in read["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=name in WHOLE_WORDS))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_step(step) for step in _steps(name)])
    if name in NORMALIZERS:
        tokenizer.normalizer = getattr(normalizers, NORMALIZERS[name])()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    first, last = around
    if first or last:
        template = [*([first] if first else []), "$A", *([last] if last else [])]
        special = [(token, vocabulary[token]) for token in (first, last) if token]
        byte_level = processors.ByteLevel(trim_offsets=False)
        tokenizer.post_processor = processors.Sequence(
            [byte_level, processors.TemplateProcessing(single=template, special_tokens=special)]
        )
    return tokenizer


def _steps(name: str) -> tuple[tuple[Any, ...], ...]:
    return next(steps for steps, known in PRE_TOKENIZERS.items() if known == name)


def _step(step: tuple[Any, ...]) -> Any:
    """The step of a pre-tokenizer that `rule` sees as `step`."""
    from tokenizers import Regex, pre_tokenizers

    kind, *values = step
    if kind == "ByteLevel":
        return pre_tokenizers.ByteLevel(add_prefix_space=values[0], use_regex=values[1])
    if kind == "Digits":
        return pre_tokenizers.Digits(individual_digits=values[0])
    return pre_tokenizers.Split(Regex(values[0]), behavior=values[1].lower(), invert=values[2])
