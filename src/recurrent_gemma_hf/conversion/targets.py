"""Write checkpoints piece by piece, staged so that an interrupted run leaves nothing."""

import json
import math
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .checks import ConversionError
from .mapping import SAME, Row
from .sources import WHOLE

PIECE_BYTES = 64 * 2**20  # size of a piece of an array that is converted in several


class Spec(NamedTuple):
    """Describes an array before it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Return the size in memory and in a file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def piece_rows(self) -> int:
        """Return the number of rows in a piece."""
        return max(1, PIECE_BYTES // (math.prod(self.shape[1:]) * self.dtype.itemsize or 1))


Plan = Mapping[str, Spec]


def total_bytes(plan: Plan) -> int:
    """Return the size of all arrays of a plan."""
    return sum(spec.nbytes for spec in plan.values())


def pieces(rows: list[Row], plan: Plan) -> Iterator[tuple[Row, slice]]:
    """Yield the pieces to convert one at a time: a row of the table or, for a large array, a part of the array's rows.

    A transposed matrix is one piece, because its rows are not contiguous in the official array. The embedding, by far
    the largest array, is not transposed.
    """
    for row in rows:
        spec = plan[row.official if row.official in plan else row.ours[0]]
        if row.layout is SAME and spec.shape[0] > spec.piece_rows:
            for start in range(0, spec.shape[0], spec.piece_rows):
                yield row, slice(start, min(start + spec.piece_rows, spec.shape[0]))
        else:
            yield row, WHOLE


class Target(Protocol):
    """Defines the interface of all targets."""

    def write(self, name: str, piece: Tensor) -> None:
        """Write the next rows of the current array, or the first rows of the next array of the plan."""

    def close(self) -> None:
        """Finish the checkpoint."""


class _Progress:
    """Tracks a target's progress in its plan: arrays in order, each from its first row to its last."""

    def __init__(self, plan: Plan):
        self._plan, self._pending, self._rows = plan, list(plan), 0

    def take(self, name: str, piece: Tensor) -> tuple[int, bool]:
        """Return the first row of the piece in its array, and whether the piece ends the array."""
        spec, start = self._plan[name], self._rows
        assert name == self._pending[0], f"{name} is out of order"
        assert (tuple(piece.shape[1:]), piece.dtype) == (spec.shape[1:], spec.dtype), f"{name} is not as planned"
        self._rows += piece.shape[0]
        assert self._rows <= spec.shape[0], f"{name} has too many rows"
        ended = self._rows == spec.shape[0]
        if ended:
            self._pending.pop(0)
            self._rows = 0
        return start, ended


@contextmanager
def staged(output: Path, needed_bytes: int) -> Iterator[Path]:
    """Yield a path beside `output`, a file or a folder, that becomes `output` when the block succeeds.

    If the block fails, nothing remains; the next run removes the remains of a killed process. Raises ConversionError if
    `output` exists and is not an empty folder, another process writes it, its parent does not exist, or the disk has
    too little space.
    """
    from filelock import FileLock, Timeout

    output = output.absolute()
    if not output.parent.is_dir():
        raise ConversionError(f"{output.parent} does not exist: create it first")
    # The system releases the lock of a killed process.
    lock = FileLock(output.with_name(f".{output.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConversionError(f"another process writes {output}: wait for it, or give another output") from error
    try:
        with _staged(output, needed_bytes) as partial:
            yield partial
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def _staged(output: Path, needed_bytes: int) -> Iterator[Path]:
    if output.is_dir() and any(output.iterdir()):
        raise ConversionError(f"{output} is not empty: give a new folder, or empty it first")
    if output.is_file():
        raise ConversionError(f"{output} exists: give a new name, or remove it first")
    partial = output.with_name(f".{output.name}.partial")
    _remove(partial)
    free = shutil.disk_usage(output.parent).free
    if free < needed_bytes:
        raise ConversionError(
            f"{output.parent} has {free / 1e9:.2f} GB free, the result takes {needed_bytes / 1e9:.2f} GB: make room, "
            "or give an output on another disk"
        )
    try:
        yield partial
        partial.replace(output)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Convert to NumPy without changing values; NumPy's bfloat16 comes from JAX's package ml_dtypes."""
    import ml_dtypes

    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


# --- safetensors ------------------------------------------------------------------------------------------------------


class SafetensorsFolder:
    """Writes model.safetensors, or shards and their index, piece by piece in the order of the plan.

    The library writes a file in one call and needs all tensors in memory, so this class writes the format itself: 8
    bytes with the length of a JSON header, the header, and the concatenated tensors
    (https://huggingface.co/docs/safetensors).
    """

    SHARD_BYTES = 5 * 10**9
    _NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}

    def __init__(self, folder: Path, plan: Plan):
        folder.mkdir()
        self._folder, self._plan = folder, plan
        self._shards = self._split()
        self._first_of = {names[0]: file for file, names in self._shards.items()}
        self._file: BinaryIO | None = None
        self._progress = _Progress(plan)
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": total_bytes(plan)},
                "weight_map": {name: file for file, names in self._shards.items() for name in names},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _split(self) -> dict[str, list[str]]:
        shards: list[list[str]] = [[]]
        size = 0
        for name, spec in self._plan.items():
            if size and size + spec.nbytes > self.SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += spec.nbytes
        if len(shards) == 1:
            return {"model.safetensors": shards[0]}
        return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, start=1)}

    def write(self, name: str, piece: Tensor) -> None:
        """Append the next piece."""
        start, _ = self._progress.take(name, piece)
        if start == 0 and name in self._first_of:
            self._open_shard(self._first_of[name])
        self._file.write(_bytes_of(piece))

    def _open_shard(self, file: str) -> None:
        self.close()
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in self._shards[file]:
            shape, dtype = self._plan[name]
            end = offset + self._plan[name].nbytes
            header[name] = {"dtype": self._NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data are aligned
        self._file = (self._folder / file).open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def close(self) -> None:
        """Finish the current file."""
        if self._file is not None:
            self._file.close()


# --- .pt --------------------------------------------------------------------------------------------------------------


class TorchFile:
    """Writes a state dict as torch.save does, piece by piece in the order of the plan.

    torch.save needs all tensors in memory, but can omit their bytes (`torch.serialization.skip_data`). This class
    copies the small records of such a skeleton and then appends the bytes of the tensors.
    """

    _ALIGNMENT = 64  # of torch.save, so that tensors can be mapped from the file
    _ZIP64_FROM = 2**31 - 1

    def __init__(self, file: Path, plan: Plan):
        self._plan, self._progress = plan, _Progress(plan)
        self._numbers = {name: number for number, name in enumerate(plan)}
        self._record: IO[bytes] | None = None
        skeleton = file.with_name(f"{file.name}.skeleton")
        try:
            self._save_skeleton(skeleton)
            self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
            with zipfile.ZipFile(skeleton) as records:
                for record in records.infolist():
                    name = record.filename.partition("/")[2]
                    if not name.startswith("data/"):
                        self._zip.writestr(f"archive/{name}", records.read(record))
        finally:
            skeleton.unlink(missing_ok=True)

    def _save_skeleton(self, file: Path) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode  # as skip_data's documentation has it

        with FakeTensorMode():
            fakes = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in self._plan.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(fakes, file)

    def write(self, name: str, piece: Tensor) -> None:
        """Append the next piece: the n-th tensor of the plan is the record data/n."""
        start, ended = self._progress.take(name, piece)
        if start == 0:
            self._record = self._open_record(name)
        self._record.write(_bytes_of(piece))
        if ended:
            self._end_record()

    def _open_record(self, name: str) -> IO[bytes]:
        record = zipfile.ZipInfo(f"archive/data/{self._numbers[name]}")
        large = self._plan[name].nbytes >= self._ZIP64_FROM
        # A local header is 30 bytes, the name, and extra fields: 20 bytes for large sizes, and our padding.
        start = self._zip.start_dir + 30 + len(record.filename) + (20 if large else 0) + 4
        padding = -start % self._ALIGNMENT
        record.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
        return self._zip.open(record, "w", force_zip64=large)

    def _end_record(self) -> None:
        if self._record is not None:
            self._record.close()
            self._record = None

    def close(self) -> None:
        """Write the table of contents."""
        self._end_record()  # still open after an interruption
        self._zip.close()


# --- Orbax ------------------------------------------------------------------------------------------------------------


class OrbaxFolder:
    """Writes an Orbax checkpoint with one zarr folder per array, piece by piece, with the outer `params`.

    Orbax saves whole trees from memory. This layout, which every Orbax version reads, consists of arrays that
    tensorstore can write piece by piece, and a description of the tree. A piece is a chunk, so that no chunk is written
    twice.
    """

    def __init__(self, folder: Path, plan: Plan):
        folder.mkdir()
        self._folder, self._plan, self._progress = folder, plan, _Progress(plan)
        self._array: Any = None  # currently being written
        leaves = {}
        for name in plan:
            keys = ("params", *_tree_keys(name))
            leaves[str(keys)] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],
                # A NumPy array is restored without a warning about devices, and as a jax.Array on request.
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
        tree = {
            "tree_metadata": leaves,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (folder / "_METADATA").write_text(json.dumps(tree))

    def write(self, name: str, piece: Tensor) -> None:
        """Write the next piece."""
        start, ended = self._progress.take(name, piece)
        if start == 0:
            self._array = self._create(name)
        self._array[start : start + len(piece)].write(to_numpy(piece)).result()
        if ended:
            self._array = None

    def _create(self, name: str) -> Any:
        import tensorstore

        planned = self._plan[name]
        dtype = str(planned.dtype).removeprefix("torch.")
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{self._folder}/params.{name}/"},
            "metadata": {
                "shape": list(planned.shape),
                "chunks": [min(planned.piece_rows, planned.shape[0]), *planned.shape[1:]],
                "dtype": {"float32": "<f4"}.get(dtype, dtype),
                "compressor": {"id": "zstd", "level": 1},
            },
            "store_data_equal_to_fill_value": True,
        }
        return tensorstore.open(spec, create=True, write=True).result()

    def close(self) -> None:
        """Mark the checkpoint as complete, as Orbax does."""
        (self._folder / "commit_success.txt").write_text("Checkpoint commit was successful.\n")


def _tree_keys(name: str) -> list[str]:
    """Return the path of keys to an array in a Flax tree; `blocks.N` is one key."""
    keys = name.split(".")
    return [".".join(keys[:2]), *keys[2:]] if keys[0] == "blocks" else keys
