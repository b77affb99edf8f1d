"""Read checkpoints one array at a time: Orbax folders, .pt archives of torch.save, safetensors folders.

Each source has `shapes` and `dtypes` by name (available without reading any array), the mapping's `dialect` if it is an
official one, and `read(name, part)`, which returns a CPU tensor: the array, or a part of its rows. A source keeps
nothing in memory, except that an Orbax source caches a decoded chunk while its array is read in parts.
"""

import json
import math
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from .checks import ConversionError
from .mapping import Dialect

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WHOLE = slice(None)  # all rows of an array
_CACHE_SLACK_BYTES = 2**20  # what tensorstore adds to the size of a decoded chunk
_CHECKED_BYTES = 8 * 2**20  # read at a time while checksums are computed
_DAMAGED = "the file is damaged or incomplete: copy or download the checkpoint again"


class Source(Protocol):
    """Defines the interface of all sources."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str, part: slice = WHOLE) -> Tensor:
        """Return the array of this name, or `part` of its rows."""


class OfficialSource(Source, Protocol):
    """Reads a checkpoint of the official code."""

    dialect: Dialect


# --- Orbax ------------------------------------------------------------------------------------------------------------


class OrbaxSource:
    """Reads an Orbax checkpoint: OCDBT or one folder per array, zarr or zarr3, with or without the outer `params`."""

    dialect: Dialect = "jax"

    def __init__(self, path: Path):
        self.path = path
        self._base = self._find_store()
        self._specs: dict[str, dict] = {}
        self._arrays = self._open_arrays()
        self._in_parts: tuple[str, Any] = ("", None)  # name and array of the last read in parts
        self.shapes = {name: tuple(array.shape) for name, array in self._arrays.items()}
        self.dtypes = {name: _dtype(name, array.dtype.name) for name, array in self._arrays.items()}

    def _find_store(self) -> dict:
        """Return the tensorstore spec of the key-value store that holds the arrays."""
        if not self.path.is_dir():
            raise ConversionError(f"{self.path} is not a folder: an Orbax checkpoint is one")
        entries = {entry.name for entry in self.path.iterdir()}
        if not entries:
            raise ConversionError(f"{self.path} is empty: give the folder that holds the Orbax checkpoint")
        # Mapped, not copied: the file's bytes stay in the page cache, which the system can reclaim.
        files = {"driver": "file", "path": f"{self.path.resolve()}/", "file_io_mode": {"mode": "memmap"}}
        if not entries & {"_METADATA", "checkpoint"}:
            inside = " or ".join(str(file.parent) for file in sorted(self.path.glob("*/_METADATA")))
            remedy = (
                f"give {inside}, which has one" if inside else "it is no Orbax checkpoint, or the copy is incomplete"
            )
            raise ConversionError(
                f"{self.path} has no _METADATA (nor, as the oldest Orbax wrote it, a file `checkpoint`): {remedy}. It "
                f"holds {', '.join(sorted(entries)[:5])}"
            )
        if "manifest.ocdbt" in entries:
            return {"driver": "ocdbt", "base": files}
        if self._metadata().get("use_ocdbt"):
            raise ConversionError(f"{self.path} has no manifest.ocdbt, which its _METADATA announces: {_DAMAGED}")
        return files

    def _metadata(self) -> dict:
        file = self.path / "_METADATA"
        try:
            return json.loads(file.read_text()) if file.exists() else {}
        except ValueError as error:
            raise ConversionError(f"{file} is not JSON ({error}): {_DAMAGED}") from error

    def _open_arrays(self) -> dict:
        import tensorstore

        # Older Orbax omits pieces of an array that hold only zeros. If the metadata says that zeros are stored, a
        # missing piece means damage.
        zeros_are_stored = self._metadata().get("store_array_data_equal_to_fill_value", False)
        drivers = {".zarray": "zarr", "zarr.json": "zarr3"}
        arrays = {}
        try:
            keys = tensorstore.KvStore.open(self._base).result().list().result()
            for folder, _, file in sorted(key.decode().rpartition("/") for key in keys):
                if file not in drivers:
                    continue
                spec = {
                    "driver": drivers[file],
                    "kvstore": {**self._base, "path": f"{self._base.get('path', '')}{folder}/"},
                    "fill_missing_data_reads": not zeros_are_stored,
                }
                self._specs[folder] = spec
                arrays[folder] = array = tensorstore.open(spec, open=True, read=True).result()
                chunk = array.chunk_layout.read_chunk.shape
                if any(size > max(1, whole) for size, whole in zip(chunk or (), array.shape, strict=True)):
                    raise ConversionError(
                        f"{folder} of {self.path} has chunks of {tuple(chunk)} in an array of {tuple(array.shape)}: "
                        f"{_DAMAGED}"
                    )
        except (ValueError, OSError) as error:
            raise ConversionError(f"cannot open {self.path}: {_first_line(error)}; {_DAMAGED}") from error
        self._refuse_undescribed(arrays)
        if arrays and all(name.startswith("params.") for name in arrays):
            arrays = {name.removeprefix("params."): array for name, array in arrays.items()}
            self._specs = {name.removeprefix("params."): spec for name, spec in self._specs.items()}
        return arrays

    def _refuse_undescribed(self, arrays: dict) -> None:
        """Raise if an array listed in _METADATA lacks its own metadata: it would be ignored silently."""
        tree = self._metadata().get("tree_metadata", {}).values()
        announced = {".".join(str(key["key"]) for key in leaf["key_metadata"]) for leaf in tree}
        if lacking := sorted(announced - set(arrays)):
            raise ConversionError(
                f"{self.path} lacks the array metadata (.zarray or zarr.json) of {', '.join(lacking)}: {_DAMAGED}"
            )

    def read(self, name: str, part: slice = WHOLE) -> Tensor:
        """Return the array of this name, or `part` of its rows."""
        try:
            array = self._open_in_parts(name)[part] if part != WHOLE else self._arrays[name]
            array = array.read().result()
        except (ValueError, OSError) as error:
            raise ConversionError(f"cannot read {name} of {self.path}: {_first_line(error)}; {_DAMAGED}") from error
        if self.dtypes[name] == torch.bfloat16:  # torch cannot read the bfloat16 of ml_dtypes
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def _open_in_parts(self, name: str) -> Any:
        """Open the array with a cache of decoded chunks, so that the next rows need no second decoding.

        Orbax stores an array, or a device's shard of it, as one compressed chunk, which must be decoded as a whole for
        a single row. The cache is released when another array is opened.
        """
        import tensorstore

        if self._in_parts[0] != name:
            self._in_parts = ("", None)
            rows = self._arrays[name].chunk_layout.read_chunk.shape[0]
            nbytes = rows * math.prod(self.shapes[name][1:]) * self.dtypes[name].itemsize
            context = tensorstore.Context({"cache_pool": {"total_bytes_limit": nbytes + _CACHE_SLACK_BYTES}})
            array = tensorstore.open(self._specs[name], open=True, read=True, context=context).result()
            self._in_parts = (name, array)
        return self._in_parts[1]


# --- .pt --------------------------------------------------------------------------------------------------------------


class TorchSource:
    """Reads a state dict from a file of torch.save; raises on code in it and never executes it."""

    dialect: Dialect = "torch"
    # Pages stay mapped until the file is closed, so it is reopened from time to time.
    REOPEN_AFTER_BYTES = 256 * 2**20

    def __init__(self, path: Path):
        self.path = path
        self._tensors = self._load(first=True)
        self._read_bytes = 0
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {
            name: _dtype(name, str(tensor.dtype).removeprefix("torch.")) for name, tensor in self._tensors.items()
        }

    def check(self) -> None:
        """Compare every byte with the CRC-32 of its member of the archive, which torch.load does not read."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
                size = sum(member.file_size for member in members)
                with tqdm(desc="checksums", total=size, unit="B", unit_scale=True, disable=None) as progress:
                    for member in members:
                        with archive.open(member) as file:
                            while part := file.read(_CHECKED_BYTES):
                                progress.update(len(part))
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
            raise ConversionError(
                f"{self.path} does not have its checksums ({_first_line(error)}): {_DAMAGED}"
            ) from error

    def _load(self, first: bool = False) -> dict[str, Tensor]:
        if self.path.is_dir():
            raise ConversionError(f"{self.path} is a folder: give the .pt file in it")
        if not self.path.exists():
            raise ConversionError(f"{self.path} does not exist")
        if not zipfile.is_zipfile(self.path):
            raise ConversionError(
                f"{self.path} is not a file of torch.save (a zip archive), or it is cut off. Other pickles can hold "
                "code and are not opened"
            )
        if first:
            self.check()
        try:
            loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ConversionError(
                f"{self.path} holds Python objects besides tensors, which could run code when they are loaded: "
                f"refused. Save model.state_dict() alone. ({_first_line(error)})"
            ) from error
        except Exception as error:  # there is no end to what a strange pickle raises
            raise ConversionError(f"cannot open {self.path}: {_first_line(error)}; {_DAMAGED}") from error
        if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
            raise ConversionError(f"{self.path} is no state dict (names and tensors): save model.state_dict()")
        return loaded

    def read(self, name: str, part: slice = WHOLE) -> Tensor:
        """Return the tensor of this name, or `part` of its rows, mapped from the file."""
        if self._read_bytes > self.REOPEN_AFTER_BYTES:
            self._tensors, self._read_bytes = self._load(), 0
        tensor = self._tensors[name][part]
        self._read_bytes += tensor.nbytes
        return tensor


# --- safetensors ------------------------------------------------------------------------------------------------------


class HfSource:
    """Reads a folder of `save_pretrained`: model.safetensors, or shards with model.safetensors.index.json."""

    _DTYPES = {"F32": "float32", "BF16": "bfloat16"}

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._file_of: dict[str, Path] = {}
        for file in self._files():
            with self._open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    view = tensors.get_slice(name)
                    self.shapes[name] = tuple(view.get_shape())
                    self.dtypes[name] = _dtype(name, self._DTYPES.get(view.get_dtype(), view.get_dtype()))
                    self._file_of[name] = file
        self._drop_tied_head()

    def _files(self) -> list[Path]:
        single, index = self.path / "model.safetensors", self.path / "model.safetensors.index.json"
        if not (self.path / "config.json").is_file():
            raise ConversionError(f"{self.path} has no config.json: give a folder written by save_pretrained")
        if index.is_file():
            names = set(json.loads(index.read_text())["weight_map"].values())
            if strange := sorted(str(name) for name in names if Path(name).name != name or name == ".."):
                raise ConversionError(f"{index} names {', '.join(strange[:3])}, outside its folder: refused")
            return sorted(self.path / name for name in names)
        if single.is_file():
            return [single]
        raise ConversionError(f"{self.path} has neither model.safetensors nor model.safetensors.index.json")

    def _open(self, file: Path) -> safe_open:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"cannot open {file}: {error}; {_DAMAGED}") from error

    def _drop_tied_head(self) -> None:
        """Drop a saved copy of the tied head after checking that it equals the embedding."""
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        if head in self.shapes and embedding in self.shapes:
            if not torch.equal(self.read(head), self.read(embedding)):
                raise ConversionError(f"{head} differs from {embedding}: in the official code they are one")
            del self.shapes[head], self.dtypes[head]

    def read(self, name: str, part: slice = WHOLE) -> Tensor:
        """Return the tensor of this name, or `part` of its rows. Opens the file for this read only, then unmaps it."""
        with self._open(self._file_of[name]) as tensors:
            return tensors.get_slice(name)[part]


def _dtype(name: str, dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise ConversionError(f"{name} is {dtype}; only {' and '.join(DTYPES)} arrays can be converted")
    return DTYPES[dtype]


def _first_line(error: Exception) -> str:
    return (str(error).split(" [", 1)[0].splitlines() or [type(error).__name__])[0]
