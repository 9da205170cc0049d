"""The writer: each format in its place, checked before, and its size and padding in the log."""

from __future__ import annotations

import logging

import pytest

from LLMPruner.config import EXPORT_FORMATS, ExportConfig
from LLMPruner.errors import UsageError
from LLMPruner.export import writer
from LLMPruner.export.layout import filled, stock
from LLMPruner.export.writer import check_export, write_exports
from LLMPruner.model.source import find_model
from tests.export.test_hf import pruned


def test_every_format_goes_to_its_place_and_the_log_tells_its_padding(tokenizer, tmp_path, caplog):
    loaded = pruned(tokenizer, removed=True)
    with caplog.at_level(logging.INFO, "LLMPruner"):
        written = write_exports(loaded, ExportConfig(tuple(EXPORT_FORMATS)), tmp_path / "new" / "folder", {})
    assert written == [tmp_path / "new" / "folder" / name for name in EXPORT_FORMATS.values()]
    found = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert found == {*EXPORT_FORMATS.values(), "model.md", "Modelfile"}
    lines = {record.getMessage() for record in caplog.records if record.getMessage().startswith("exported ")}
    for path, layout in zip(written, (filled(loaded.plan), filled(loaded.plan), stock(loaded.plan)), strict=True):
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files) / 1e6
        zeros = layout.total_params - loaded.plan.total_params
        assert zeros and f"exported {path}: {size:.1f} MB, {zeros:,} of its parameters are padding" in lines


@pytest.mark.parametrize(("kind", "said"), [("auto", 1), ("f16", 1), ("q8_0", 0)])
def test_the_next_step_to_four_bits_is_named_once(kind, said, tokenizer, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(writer.logger, "info", lambda text, *values: lines.append(text % values))
    write_exports(pruned(tokenizer), ExportConfig(("gguf", "padded"), kind), tmp_path, {})
    step = f"llama-quantize {tmp_path}/model.gguf {tmp_path}/model-Q4_K_M.gguf Q4_K_M"
    assert sum(line.endswith(step) for line in lines) == said


def test_a_strangers_modelfile_stops_all_formats_before_the_first(tokenizer, tmp_path):
    (tmp_path / "Modelfile").write_text("FROM llama3")
    with pytest.raises(UsageError, match="Modelfile was not written by an export"):
        write_exports(pruned(tokenizer), ExportConfig(("hf", "gguf")), tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["Modelfile"]


@pytest.mark.parametrize("formats", [("gguf",), ("hf", "gguf")])
def test_a_tokenizer_without_a_name_is_refused_only_where_a_gguf_is_wanted(formats, trained_dir, tokenizer, monkeypatch):
    def refuse(_):
        raise UsageError("it cannot be named")

    source = find_model(str(trained_dir), "--model_path")
    check_export(source, tokenizer, ExportConfig(formats))
    monkeypatch.setattr("LLMPruner.export.gguf.pre_tokenizer_name", refuse)
    with pytest.raises(UsageError, match="cannot be named"):
        check_export(source, tokenizer, ExportConfig(formats))
    check_export(source, tokenizer, ExportConfig(("hf", "padded")))
