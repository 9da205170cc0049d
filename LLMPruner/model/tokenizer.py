"""A model's tokenizer: loaded alone, before any weight is read, and kept as text inside our `.bin`."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.errors import RunError, UsageError, one_line
from LLMPruner.model.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Blanks, digits, line ends, contractions, code, accents and scripts: what a wrongly read tokenizer splits otherwise.
PROBES = (
    " The river's 1234567 stones,  it'll weigh 12.5 kg.\n\n\tdef f(x):\r\n        return x ** 2\n",
    "a  123   Straße naïve déjà-vu e\u0301 ½ ² 東京 23区 مرحبا 🙂🙂 \u00a0end ",
)
NAMED_TEMPLATE = re.compile(r"additional_chat_templates/[\w-]+\.jinja")  # chat templates beside the default one
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer alone, so that data can be checked before any weight is read.

    The pipeline is that of `tokenizer.json`, whatever class `tokenizer_config.json` names: transformers 5 rebuilds some classes
    by rules of their own, and a byte-level tokenizer named LlamaTokenizerFast loses all blanks. Raises UsageError where there
    is none, or where it does not give the ids that the file itself gives.
    """
    with quiet_transformers():
        if source.gguf is not None:
            from LLMPruner.model.gguf_tokenizer import tokenizer_of_gguf

            return tokenizer_of_gguf(source.path, source.gguf.tokenizer_fields())
        if source.kind == "hf":
            if not (source.path / "tokenizer.json").is_file():
                raise UsageError(f"{source.path} has no tokenizer.json: save the model's fast tokenizer beside its weights")
            return _from_folder(source.path, source.path)
        with tempfile.TemporaryDirectory() as folder:
            for name, text in json.loads(source.meta["__tokenizer__"]).items():
                if name not in TOKENIZER_FILES and not NAMED_TEMPLATE.fullmatch(name):
                    raise RunError(f"{source.path} carries an unexpected tokenizer file: {name}")
                Path(folder, name).parent.mkdir(exist_ok=True)
                Path(folder, name).write_text(text, encoding="utf-8")
            return _from_folder(Path(folder), source.path)


def _from_folder(folder: Path, shown: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder's files; `shown` is where they come from."""
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # each broken file raises its own kind
        raise UsageError(f"{shown} has no usable tokenizer: {one_line(error)}") from error
    if not isinstance(tokenizer.chat_template, str | dict | list | None):
        raise UsageError(f"{shown} has a chat_template that is no text: correct its tokenizer_config.json")
    if not reads_as_its_file(tokenizer, folder / "tokenizer.json"):
        raise UsageError(
            f"{shown}: transformers makes other ids of its tokenizer than its tokenizer.json says: update both, "
            "or save the tokenizer anew with save_pretrained"
        )
    return tokenizer


def reads_as_its_file(tokenizer: PreTrainedTokenizerBase, file: Path) -> bool:
    """Whether a tokenizer gives the ids that `tokenizer.json` itself gives, of text with all that is easily lost."""
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    return all(tokenizer(text, verbose=False).input_ids == own.encode(text).ids for text in PROBES)


def tokenizer_files(tokenizer: Any) -> dict[str, str]:
    """The texts of the files that the tokenizer is saved as, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
        wanted = (name for name in files if name in TOKENIZER_FILES or NAMED_TEMPLATE.fullmatch(name))
        return {name: files[name].read_text("utf-8") for name in sorted(wanted)}


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
