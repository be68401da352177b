"""Tensors in one safetensors file, each stored once, with what the file itself cannot say."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxmpq.artefact import check_fields
from fxmpq.errors import FileFormatError
from fxmpq.storage.values import DTYPES

_FILE = re.compile(r"tensors-[0-9a-f]{32}\.safetensors")
_PATTERN = "tensors-*.safetensors"
_CHUNK = 1 << 22
_ENTRY = "a stored tensor"
_FIELDS = frozenset({"key", "dtype", "shape", "stride"})


class TensorWriter:
    """Collects tensors; the same one given twice is stored once."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._keys: dict[int, str] = {}
        self._kept: list[Tensor] = []
        self._memory: set[int] = set()

    def add(self, key: str, tensor: Tensor) -> dict[str, object]:
        """Take a tensor and return its entry: key, dtype, shape and strides.

        Args:
            key: Its name in the file, unless it is there already.
            tensor: Dense, on any device.

        Raises:
            FileFormatError: If it is sparse, quantized or without data.
        """
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise FileFormatError(
                f"{key!r} is a {'meta' if tensor.is_meta else tensor.layout} tensor; only dense "
                "tensors with data can be stored"
            )
        if id(tensor) not in self._keys:
            # A reference keeps the id from being used anew.
            self._kept.append(tensor)
            self._keys[id(tensor)] = key
            plain = tensor.detach().cpu().resolve_conj().resolve_neg()
            plain = torch.view_as_real(plain) if plain.is_complex() else plain
            self._tensors[key] = self._own(plain.contiguous())
        return {
            "key": self._keys[id(tensor)],
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()) if _is_dense(tensor.shape, tensor.stride()) else None,
        }

    def _own(self, tensor: Tensor) -> Tensor:
        """A tensor that shares its memory with no other; safetensors takes only such."""
        memory = tensor.untyped_storage()
        is_whole = memory.nbytes() == tensor.numel() * tensor.element_size()
        if not is_whole or memory.data_ptr() in self._memory:
            tensor = tensor.clone()
        self._memory.add(tensor.untyped_storage().data_ptr())
        return tensor

    def write(self, folder: Path) -> str:
        """Write the file, named after its content, and return its name."""
        temporary = folder / "tensors.partial"
        try:
            save_file(self._tensors, temporary, {"format": "pt"})
            name = f"tensors-{_digest(temporary)}.safetensors"
            temporary.replace(folder / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return name


class TensorReader:
    """Reads tensors of a file; an entry read twice is one tensor.

    Args:
        folder: Where the file is.
        name: The file's name, which has its digest.
        device: Where the tensors go.

    Raises:
        FileFormatError: If the name is none, or the file is missing or damaged.
    """

    def __init__(self, folder: Path, name: object, device: torch.device) -> None:
        if not isinstance(name, str) or not _FILE.fullmatch(name):
            raise FileFormatError(f"a file of tensors is tensors-<digest>.safetensors; not {name}")
        self._path = folder / name
        self._device = device
        self._read: dict[str, Tensor] = {}
        if not self._path.is_file():
            raise FileFormatError(f"{str(self._path)!r} is missing; save the graph again")
        if name != f"tensors-{_digest(self._path)}.safetensors":
            raise FileFormatError(f"{str(self._path)!r} is damaged; save the graph again")
        try:
            self._file = safe_open(self._path, framework="pt")
        except SafetensorError as error:
            raise FileFormatError(f"{str(self._path)!r} holds no tensors: {error}") from error

    def tensor(self, entry: object) -> Tensor:
        """The tensor of an entry.

        Raises:
            FileFormatError: If the file has no such tensor, or another dtype or shape.
        """
        if not isinstance(entry, dict):
            raise FileFormatError(f"{_ENTRY} is an object; found {entry!r}")
        check_fields(_ENTRY, entry, set(_FIELDS), set())
        key = str(entry["key"])
        if key not in self._read:
            self._read[key] = self._load(key, entry)
        found = self._read[key]
        _check(key, entry, found)
        return found

    def _load(self, key: str, entry: Mapping[str, object]) -> Tensor:
        try:
            # A copy of its own: what comes back lies in the mapped file.
            stored: Tensor = self._file.get_tensor(key)  # type: ignore[no-untyped-call]  # no types
            stored = stored.clone()
        except SafetensorError as error:
            raise FileFormatError(f"{str(self._path)!r} has no tensor {key!r}: {error}") from error
        dtype = DTYPES.get(str(entry["dtype"]))
        is_complex = dtype is not None and dtype.is_complex
        if is_complex and stored.is_floating_point() and stored.shape[-1:] == (2,):
            stored = torch.view_as_complex(stored)
        _check(key, entry, stored)
        stride = _stride(key, entry["stride"], stored.shape)
        if stride != stored.stride():
            stored = torch.empty_strided(stored.shape, stride, dtype=stored.dtype).copy_(stored)
        return stored.to(self._device)


def remove_others(folder: Path, name: str) -> None:
    """Remove the tensor files of earlier saves to a folder."""
    for file in folder.glob(_PATTERN):
        if file.name != name and _FILE.fullmatch(file.name):
            file.unlink(missing_ok=True)


def _check(key: str, entry: Mapping[str, object], found: Tensor) -> None:
    if str(found.dtype) != f"torch.{entry['dtype']}" or list(found.shape) != entry["shape"]:
        raise FileFormatError(
            f"expected {key!r} as {entry['dtype']} {entry['shape']}; the file has {found.dtype} "
            f"{list(found.shape)}"
        )


def _stride(key: str, found: object, shape: torch.Size) -> tuple[int, ...]:
    """Strides as stored; those of a contiguous tensor if there are none."""
    if found is None:
        return torch.empty(shape, device="meta").stride()
    steps = found if isinstance(found, list) else []
    stride = tuple(step for step in steps if type(step) is int and step >= 0)
    if len(stride) != len(steps) or not _is_dense(shape, stride):
        raise FileFormatError(f"{key!r} of shape {list(shape)} cannot have the strides {found}")
    return stride


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether strides fill memory without gaps and overlaps, in any order of dimensions."""
    if len(shape) != len(stride):
        return False
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1 and step != expected:
            return False
        expected *= max(size, 1)
    return True


def _digest(path: Path) -> str:
    """BLAKE2b of a file, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
