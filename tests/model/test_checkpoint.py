"""The .bin: bit-exact, flat, its header read without torch, and never unpickled blindly."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from LLMPruner.errors import DamagedError, RunError, UsageError
from LLMPruner.model import checkpoint
from LLMPruner.model.checkpoint import META_KEYS, META_MEMBER, load_checkpoint, read_meta, save_checkpoint

META = {key: f'{{"{key}": "ü"}}' for key in META_KEYS[1:]}
HEADER = {"__format__": "LLMPruner/1", **META}
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


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A copy of a zip with its members changed; None leaves one out."""
    copy = path.with_name("changed.bin")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        for name in source.namelist():
            data = change(name.split("/", 1)[1], source.read(name))
            if data is not None:
                target.writestr(name, data)
    return copy


def save_the_old_way(path: Path, payload: dict[str, object]) -> None:
    """As before the reserved strings had a member of their own."""
    torch.save({**HEADER, **payload}, path)


@pytest.mark.parametrize("save", ["now", "before"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_checkpoint_comes_back_bit_exact(tmp_path, dtype, save):
    path = tmp_path / "model.bin"
    if save == "now":
        save_checkpoint(path, tensors(dtype), META)
    else:
        save_the_old_way(path, tensors(dtype))
    loaded, meta = load_checkpoint(path)
    assert loaded.keys() == tensors(dtype).keys()
    for name, tensor in tensors(dtype).items():
        assert loaded[name].dtype == dtype and torch.equal(loaded[name], tensor)
    assert meta == read_meta(path) == HEADER


def test_the_file_is_flat_and_loads_with_weights_only(tmp_path):
    path = tmp_path / "model.bin"
    save_checkpoint(path, tensors(torch.float32), META)
    payload = torch.load(path, weights_only=True, mmap=True)
    assert type(payload) is dict and payload.keys() == {*META_KEYS, *tensors(torch.float32)}
    assert all(isinstance(payload[key], str) for key in META_KEYS)
    assert all(isinstance(payload[key], torch.Tensor) for key in tensors(torch.float32))


def test_the_member_says_what_the_pickle_says_and_is_read_without_torch(tmp_path):
    path = tmp_path / "model.bin"
    save_checkpoint(path, tensors(torch.float32), META)
    payload = torch.load(path, weights_only=True)
    code = "import json, sys\nfrom pathlib import Path\nfrom LLMPruner.model.checkpoint import read_meta\n"
    code += "print(json.dumps([read_meta(Path(sys.argv[1])), 'torch' in sys.modules]))"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code, path], cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [{key: payload[key] for key in META_KEYS}, False]


def test_meta_strings_that_are_one_object_are_all_read(tmp_path):
    same = "{}"
    save_checkpoint(tmp_path / "model.bin", tensors(torch.float32), dict.fromkeys(META, same))
    assert read_meta(tmp_path / "model.bin").keys() == set(META_KEYS)
    torch.save({"__format__": "LLMPruner/1", **dict.fromkeys(META, same)}, tmp_path / "old.bin")
    assert read_meta(tmp_path / "old.bin").keys() == set(META_KEYS)


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
    with pytest.raises(DamagedError, match=f"damaged: it lacks {missing}"):
        read_meta(tmp_path / "model.bin")


@pytest.mark.parametrize("save", ["now", "before"])
def test_a_newer_format_asks_for_an_update(tmp_path, monkeypatch, save):
    if save == "now":
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "FORMAT", "LLMPruner/99")
            save_checkpoint(tmp_path / "model.bin", {}, META)
    else:
        torch.save({"__format__": "LLMPruner/99", **META}, tmp_path / "model.bin")
    with pytest.raises(UsageError, match="update the tool"):
        read_meta(tmp_path / "model.bin")


@pytest.mark.parametrize("stored", [b"", b"{", b"\xff\xfe", b"[]", b'{"__format__": 1}', b'{"__format__": null}'])
def test_a_member_that_is_no_record_of_strings_is_damage(tmp_path, stored):
    save_checkpoint(tmp_path / "model.bin", tensors(torch.float32), META)
    path = rewritten(tmp_path / "model.bin", lambda name, data: stored if name == META_MEMBER else data)
    for read in (read_meta, load_checkpoint):
        with pytest.raises(DamagedError, match=f"damaged: its {META_MEMBER} is not"):
            read(path)


def test_a_member_without_tensors_behind_it_is_refused(tmp_path):
    save_checkpoint(tmp_path / "model.bin", tensors(torch.float32), META)
    with pytest.raises(UsageError, match="zip file without tensors"):
        read_meta(rewritten(tmp_path / "model.bin", lambda name, data: None if name == "data.pkl" else data))
    broken = rewritten(tmp_path / "model.bin", lambda name, data: None if name.startswith("data/") else data)
    with pytest.raises(RunError, match="damaged and cannot be read"):
        load_checkpoint(broken)


@pytest.mark.parametrize("bomb", [Bomb, Shell])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("header", [{}, HEADER], ids=["bare", "with our header"])
@pytest.mark.parametrize("place", ["dict", "nested"])
def test_a_malicious_zip_is_refused_and_not_executed(tmp_path, bomb, protocol, header, place):
    path, mark = tmp_path / "model.bin", tmp_path / "executed"
    evil = bomb(mark) if place == "dict" else [{"a": (bomb(mark),)}]
    torch.save(header | {"weight": torch.ones(2), "evil": evil}, path, pickle_protocol=protocol)
    for read in (read_meta, load_checkpoint):
        with pytest.raises(UsageError, match="never unpickled here"):
            read(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the bomb itself must work, or this test proves nothing"


@pytest.mark.parametrize("bomb", [Bomb, Shell])
def test_a_malicious_pickle_behind_our_own_member_is_refused_and_not_executed(tmp_path, bomb):
    """The header is whole and harmless, so that only who reads the tensors can refuse."""
    path, mark = tmp_path / "evil.bin", tmp_path / "executed"
    torch.save({**HEADER, "weight": torch.ones(2), "evil": bomb(mark)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].split('/')[0]}/{META_MEMBER}", json.dumps(HEADER))
    assert read_meta(path) == HEADER
    with pytest.raises(UsageError, match="never unpickled here"):
        load_checkpoint(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the bomb itself must work, or this test proves nothing"


@pytest.mark.parametrize("legacy", ["torch", "pickle"])
def test_a_malicious_legacy_pickle_is_refused_and_not_executed(tmp_path, legacy):
    path, mark = tmp_path / "model.bin", tmp_path / "executed"
    payload = {**HEADER, "evil": Bomb(mark)}
    if legacy == "torch":
        torch.save(payload, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(payload))
    for read in (read_meta, load_checkpoint):
        with pytest.raises(UsageError, match="never unpickled here"):
            read(path)
    assert not mark.exists()


@pytest.mark.parametrize("member", [True, False], ids=["with our member", "as before it"])
def test_a_malicious_name_hidden_in_the_memo_is_found_and_not_executed(tmp_path, member):
    """The last strings before STACK_GLOBAL name a harmless global; the operands are fetched from the memo."""
    mark = tmp_path / "executed"
    save_checkpoint(tmp_path / "model.bin", tensors(torch.float32), META)
    code = pickle.PROTO + b"\x04"
    for word in ("posix", "system", "torch._utils", "_rebuild_tensor_v2"):
        code += pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode() + pickle.MEMOIZE + pickle.POP
    command = f"touch {mark}".encode()
    code += pickle.BINGET + b"\x00" + pickle.BINGET + b"\x01" + pickle.STACK_GLOBAL
    code += pickle.SHORT_BINUNICODE + bytes([len(command)]) + command + pickle.TUPLE1 + pickle.REDUCE + pickle.POP

    def change(name: str, data: bytes) -> bytes | None:
        if name == META_MEMBER and not member:
            return None
        return code + data[2:] if name == "data.pkl" else data

    evil = rewritten(tmp_path / "model.bin", change)
    for read in (load_checkpoint,) if member else (read_meta, load_checkpoint):
        with pytest.raises(UsageError, match="never unpickled here"):
            read(evil)
    assert not mark.exists()
    torch.load(evil, weights_only=False)
    assert mark.exists(), "the bomb itself must work, or this test proves nothing"


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


def test_a_checkpoint_that_is_no_dict_is_another_tools(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "model.bin")
    with pytest.raises(UsageError, match="another tool: it holds a list, not named tensors"):
        read_meta(tmp_path / "model.bin")


def test_what_is_saved_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "model.bin"
    path.write_text("old")

    def fail(self, *_):
        raise OSError("disk full")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)  # the tensors are written by then
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, tensors(torch.float32), META)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
