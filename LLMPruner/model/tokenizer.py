"""A model's tokenizer: loaded alone, before any weight is read, and kept as text inside our `.bin`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.errors import RunError, UsageError
from LLMPruner.model.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer alone, so that data can be checked before any weight is read."""
    from transformers import AutoTokenizer

    with quiet_transformers():
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


def tokenizer_files(tokenizer: Any) -> dict[str, str]:
    """The texts of the files that the tokenizer is saved as, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {name: Path(folder, name).read_text("utf-8") for name in TOKENIZER_FILES if Path(folder, name).is_file()}


@contextmanager
def quiet_transformers() -> Iterator[None]:
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
