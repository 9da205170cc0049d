"""The .bin: bit-exact, flat, written atomically, and never unpickled blindly."""

from __future__ import annotations

import pickle
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from LLMPruner.checkpoint import (
    META_KEYS,
    load_checkpoint,
    read_meta,
    require_free_space,
    save_checkpoint,
    write_atomically,
    write_json,
    write_text,
)

from LLMPruner import checkpoint
from LLMPruner.errors import RunError, UsageError

META = {key: f'{{"{key}": "ü"}}' for key in META_KEYS[1:]}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"model.layers.{i}.weight": torch.randn(3, 4 + i, generator=generator).to(dtype) for i in range(3)}


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Shell(Bomb):
    """The same through os.system, whose pickled name is another module's."""

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_checkpoint_comes_back_bit_exact(tmp_path, dtype):
    path = tmp_path / "model.bin"
    save_checkpoint(path, tensors(dtype), META)
    loaded, meta = load_checkpoint(path)
    assert loaded.keys() == tensors(dtype).keys()
    for name, tensor in tensors(dtype).items():
        assert loaded[name].dtype == dtype and torch.equal(loaded[name], tensor)
    assert meta.pop("__format__") == "LLMPruner/1" and meta == META
    assert {key: value for key, value in read_meta(path).items() if key != "__format__"} == META


def test_the_file_is_flat_and_loads_with_weights_only(tmp_path):
    path = tmp_path / "model.bin"
    save_checkpoint(path, tensors(torch.float32), META)
    payload = torch.load(path, weights_only=True, mmap=True)
    assert type(payload) is dict and payload.keys() == {*META_KEYS, *tensors(torch.float32)}
    assert all(isinstance(payload[key], str) for key in META_KEYS)
    assert all(isinstance(payload[key], torch.Tensor) for key in tensors(torch.float32))


def test_meta_strings_that_are_one_object_are_all_read(tmp_path):
    same = "{}"
    save_checkpoint(tmp_path / "model.bin", tensors(torch.float32), dict.fromkeys(META, same))
    assert read_meta(tmp_path / "model.bin").keys() == set(META_KEYS)


def test_parameters_are_saved_as_plain_tensors(tmp_path):
    path = tmp_path / "model.bin"
    save_checkpoint(path, {"w": torch.nn.Parameter(torch.ones(2))}, META)
    assert type(load_checkpoint(path)[0]["w"]) is torch.Tensor


def test_a_view_is_refused_for_it_would_save_its_base(tmp_path):
    with pytest.raises(ValueError, match="part is a view"):
        save_checkpoint(tmp_path / "model.bin", {"part": torch.ones(100)[:1]}, META)
    assert not list(tmp_path.iterdir())


def test_an_unknown_meta_key_is_refused(tmp_path):
    with pytest.raises(ValueError, match="__surprise__"):
        save_checkpoint(tmp_path / "model.bin", {}, META | {"__surprise__": ""})


@pytest.mark.parametrize("missing", ["__config__", "__plan__", "__tokenizer__", "__provenance__"])
def test_a_missing_part_is_named(tmp_path, missing):
    save_checkpoint(tmp_path / "model.bin", {}, {key: value for key, value in META.items() if key != missing})
    with pytest.raises(UsageError, match=f"damaged: it lacks {missing}"):
        read_meta(tmp_path / "model.bin")


def test_a_newer_format_asks_for_an_update(tmp_path):
    torch.save({"__format__": "LLMPruner/99", **META}, tmp_path / "model.bin")
    with pytest.raises(UsageError, match="update the tool"):
        read_meta(tmp_path / "model.bin")


@pytest.mark.parametrize("bomb", [Bomb, Shell])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("header", [{}, {"__format__": "LLMPruner/1", **META}], ids=["bare", "with our header"])
@pytest.mark.parametrize("place", ["dict", "nested"])
def test_a_malicious_zip_is_refused_and_not_executed(tmp_path, bomb, protocol, header, place):
    path, mark = tmp_path / "model.bin", tmp_path / "executed"
    evil = bomb(mark) if place == "dict" else [{"a": (bomb(mark),)}]
    torch.save(header | {"weight": torch.ones(2), "evil": evil}, path, pickle_protocol=protocol)
    for read in (read_meta, load_checkpoint):
        with pytest.raises(UsageError, match="never unpickled here" if not header else "not safe to load: it pickles"):
            read(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the bomb itself must work, or this test proves nothing"


@pytest.mark.parametrize("legacy", ["torch", "pickle"])
def test_a_malicious_legacy_pickle_is_refused_and_not_executed(tmp_path, legacy):
    path, mark = tmp_path / "model.bin", tmp_path / "executed"
    payload = {"__format__": "LLMPruner/1", **META, "evil": Bomb(mark)}
    if legacy == "torch":
        torch.save(payload, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(payload))
    for read in (read_meta, load_checkpoint):
        with pytest.raises(UsageError, match="never unpickled here"):
            read(path)
    assert not mark.exists()


def test_a_malicious_name_hidden_from_the_scan_is_found_and_not_executed(tmp_path):
    """The last strings before STACK_GLOBAL name a harmless global; the operands are fetched from the memo."""
    import zipfile

    path, mark = tmp_path / "model.bin", tmp_path / "executed"
    save_checkpoint(path, tensors(torch.float32), META)
    code = pickle.PROTO + b"\x04"
    for word in ("posix", "system", "torch._utils", "_rebuild_tensor_v2"):
        code += pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode() + pickle.MEMOIZE + pickle.POP
    command = f"touch {mark}".encode()
    code += pickle.BINGET + b"\x00" + pickle.BINGET + b"\x01" + pickle.STACK_GLOBAL
    code += pickle.SHORT_BINUNICODE + bytes([len(command)]) + command + pickle.TUPLE1 + pickle.REDUCE + pickle.POP
    evil = tmp_path / "evil.bin"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(evil, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, code + data[2:] if name.endswith("/data.pkl") else data)
    with pytest.raises(UsageError, match="pickles posix.system"):
        load_checkpoint(evil)
    assert not mark.exists()


def test_what_the_scan_would_miss_is_still_not_executed(tmp_path, monkeypatch):
    path, mark = tmp_path / "model.bin", tmp_path / "executed"
    torch.save({"__format__": "LLMPruner/1", **META, "evil": Bomb(mark)}, path)
    monkeypatch.setattr(checkpoint, "read_meta", lambda _: META)
    with pytest.raises(RunError, match="damaged"):
        load_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.999, 0.5, 0.01])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "model.bin"
    save_checkpoint(path, {"w": torch.ones(1000)}, META)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UsageError, match="truncated"):
        read_meta(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(UsageError):
        read_meta(tmp_path / "model.bin")


def test_a_zip_without_tensors_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    path = Path(shutil.make_archive(str(tmp_path / "model"), "zip", tmp_path, "a.txt"))
    with pytest.raises(UsageError, match="zip file without tensors"):
        read_meta(path)


def test_a_checkpoint_of_plain_tensors_is_another_tools(tmp_path):
    torch.save(tensors(torch.float32), tmp_path / "model.bin")
    with pytest.raises(UsageError, match="another tool .no LLMPruner/1 header"):
        read_meta(tmp_path / "model.bin")


def test_a_failing_writer_leaves_no_partial_file_and_the_old_one_whole(tmp_path):
    path = tmp_path / "model.bin"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        assert temporary.parent == path.parent, "a rename is atomic within one file system only"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_text(path, "new ü")
    assert path.read_text("utf-8") == "new ü" and list(tmp_path.iterdir()) == [path]


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"ppl": float("nan")})
    assert not list(tmp_path.iterdir())


def test_free_space_is_required_of_the_nearest_existing_folder(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda place: asked.append(place) or usage(10, 5, 5_000_000_000))
    require_free_space(tmp_path / "not" / "yet", 5_000_000_000, "the checkpoint")
    assert asked == [tmp_path]
    with pytest.raises(UsageError, match=r"the checkpoint needs 5\.1 GB and .* has 5\.0 GB free"):
        require_free_space(tmp_path, 5_100_000_000, "the checkpoint")
