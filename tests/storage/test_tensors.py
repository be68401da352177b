from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxmpq.errors import FileFormatError
from fxmpq.storage.tensors import TensorReader, TensorWriter, remove_others

CPU = torch.device("cpu")
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]


def through_file(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    writer = TensorWriter()
    entries = json.loads(
        json.dumps({key: writer.add(key, found) for key, found in tensors.items()})
    )
    reader = TensorReader(folder, writer.write(folder), CPU)
    return {key: reader.tensor(entry) for key, entry in entries.items()}


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2, (3, 16), generator=generator, dtype=torch.uint8)
    if dtype is not torch.bool:
        raw = torch.randint(0, 256, (3, 16), generator=generator, dtype=torch.uint8)
    tensor = raw.view(dtype) if dtype is not torch.bool else raw.bool()
    found = through_file({"x": tensor}, tmp_path)["x"]
    assert found.dtype is dtype
    assert found.shape == tensor.shape
    assert bits(found) == bits(tensor)


@given(st.permutations(range(4)), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_memory_order_comes_back(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], shape: list[int]
) -> None:
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape).permute(order)
    found = through_file({"x": tensor}, tmp_path_factory.mktemp("order"))["x"]
    assert found.equal(tensor)
    assert found.numel() == 0 or found.stride() == tensor.stride()


def test_channels_last_stays_so(tmp_path: Path) -> None:
    weight = torch.randn(8, 3, 1, 1).contiguous(memory_format=torch.channels_last)
    found = through_file({"w": weight}, tmp_path)["w"]
    assert found.stride() == weight.stride()


def test_a_tensor_given_twice_is_stored_once(tmp_path: Path) -> None:
    x = torch.randn(100)
    found = through_file({"a": x, "b": x, "c": x.clone()}, tmp_path)
    assert found["a"] is found["b"]
    assert found["a"] is not found["c"]
    (file,) = tmp_path.glob("*.safetensors")
    assert 800 <= file.stat().st_size < 1200


def test_views_of_one_memory_become_tensors_of_their_own(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    views = {
        "whole": whole,
        "part": whole[3:7],
        "turned": whole.view(3, 4).t(),
        "spread": whole[:1].expand(5),
        "skipped": whole[::2],
        "conjugate": torch.complex(whole, whole).conj(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
    }
    found = through_file(views, tmp_path)
    assert all(found[name].equal(view) for name, view in views.items())
    found["whole"].zero_()
    assert found["part"].equal(whole[3:7])


def test_what_is_loaded_does_not_hang_on_the_file(tmp_path: Path) -> None:
    found = through_file({"x": torch.ones(4)}, tmp_path)["x"]
    remove_others(tmp_path, "none")
    assert not list(tmp_path.iterdir())
    found += 1
    assert found.equal(torch.full((4,), 2.0))
    assert found.untyped_storage().nbytes() == 16


def test_only_older_tensor_files_are_removed(tmp_path: Path) -> None:
    kept = ["tensors-mine.safetensors", "notes.txt", f"tensors-{'1' * 32}.safetensors"]
    for name in (*kept, f"tensors-{'0' * 32}.safetensors"):
        (tmp_path / name).write_text("x")
    remove_others(tmp_path, kept[-1])
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.ones(2, 2).to_sparse(), "sparse_coo"),
        (torch.ones(2, device="meta"), "meta"),
        (nn.Parameter(torch.empty(2, device="meta")), "meta"),
    ],
)
def test_tensors_without_dense_data_are_refused(tensor: Tensor, kind: str) -> None:
    with pytest.raises(FileFormatError, match=kind):
        TensorWriter().add("x", tensor)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TensorWriter()
    writer.add("x", torch.ones(3))

    def fail(*args: object) -> None:
        Path(str(args[1])).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("fxmpq.storage.tensors.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        writer.write(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["../tensors.safetensors", "/etc/passwd", "graph.json", None, 3, "tensors-.safetensors"]
)
def test_only_files_of_the_folder_are_opened(name: object, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="tensors-<digest>.safetensors; not"):
        TensorReader(tmp_path, name, CPU)


def test_missing_and_damaged_files_are_told(tmp_path: Path) -> None:
    writer = TensorWriter()
    writer.add("x", torch.ones(30))
    name = writer.write(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match="is damaged; save the graph again"):
        TensorReader(tmp_path, name, CPU)
    (tmp_path / name).unlink()
    with pytest.raises(FileFormatError, match="is missing; save the graph again"):
        TensorReader(tmp_path, name, CPU)


def test_a_file_of_something_else_is_told(tmp_path: Path) -> None:
    import hashlib

    content = b"this is no safetensors file at all"
    name = f"tensors-{hashlib.blake2b(content, digest_size=16).hexdigest()}.safetensors"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match="holds no tensors"):
        TensorReader(tmp_path, name, CPU)


@pytest.mark.parametrize(
    "change",
    [
        {"key": "y"},
        {"dtype": "float64"},
        {"dtype": "complex64"},
        {"dtype": "nothing"},
        {"shape": [3, 2]},
        {"shape": [6]},
        {"stride": [1, 1]},
        {"stride": [0, 0]},
        {"stride": [-3, 1]},
        {"stride": [3]},
        {"stride": "ab"},
        {"stride": [3.0, 1.0]},
        {"more": 1},
    ],
)
def test_entries_that_do_not_fit_are_told(change: dict[str, object], tmp_path: Path) -> None:
    writer = TensorWriter()
    entry = writer.add("x", torch.ones(2, 3))
    reader = TensorReader(tmp_path, writer.write(tmp_path), CPU)
    with pytest.raises(FileFormatError):
        reader.tensor({**entry, **change})
    with pytest.raises(FileFormatError, match="is an object"):
        reader.tensor([entry])
    assert reader.tensor(entry).shape == (2, 3)
