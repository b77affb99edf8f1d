"""Checkpoints to write, one array at a time, and the staging that leaves nothing behind when the work is cut short."""

import json
import math
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import torch
from checks import ConversionError
from torch import Tensor


class Spec(NamedTuple):
    """What is known about an array before it is there."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in memory and in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


Plan = Mapping[str, Spec]


def total_bytes(plan: Plan) -> int:
    """The size of all arrays of a plan."""
    return sum(spec.nbytes for spec in plan.values())


class Target(Protocol):
    """What all targets have in common."""

    def write(self, name: str, tensor: Tensor) -> None:
        """Takes the next array of the plan."""

    def close(self) -> None:
        """Ends the checkpoint."""


@contextmanager
def staged(output: Path, needed_bytes: int) -> Iterator[Path]:
    """A path beside `output` to write to, a file or a folder; it becomes `output` when the block ends well.

    Whatever ends the block otherwise, an interruption included, leaves nothing; what a killed run could not remove is
    removed by the next one.
    """
    output = output.absolute()
    if output.is_dir() and any(output.iterdir()):
        raise ConversionError(f"{output} is not empty: give a new folder, or empty it first")
    if output.is_file():
        raise ConversionError(f"{output} exists: give a new name, or remove it first")
    if not output.parent.is_dir():
        raise ConversionError(f"{output.parent} does not exist: create it first")
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
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


# --- safetensors ------------------------------------------------------------------------------------------------------


class SafetensorsFolder:
    """Writes model.safetensors, or shards and their index, tensor by tensor in the order of the plan.

    The library itself writes a file in one call from tensors that are all in memory. The format is 8 bytes with the
    length of a JSON header, the header, and the tensors end to end (https://huggingface.co/docs/safetensors), so it is
    written here.
    """

    SHARD_BYTES = 5 * 10**9
    _NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}

    def __init__(self, folder: Path, plan: Plan):
        folder.mkdir()
        self._folder, self._plan = folder, plan
        self._shards = self._split()
        self._file: BinaryIO | None = None
        self._pending: list[str] = []
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

    def write(self, name: str, tensor: Tensor) -> None:
        """Appends the next tensor of the plan."""
        if not self._pending:
            self._next_shard()
        assert name == self._pending.pop(0), f"{name} is out of order"
        assert Spec(tuple(tensor.shape), tensor.dtype) == self._plan[name], f"{name} is not as planned"
        self._file.write(_bytes_of(tensor))

    def _next_shard(self) -> None:
        self.close()
        file = next(iter(self._shards))
        self._pending = self._shards.pop(file)
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in self._pending:
            shape, dtype = self._plan[name]
            end = offset + self._plan[name].nbytes
            header[name] = {"dtype": self._NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data are aligned
        self._file = (self._folder / file).open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def close(self) -> None:
        """Ends the current file."""
        if self._file is not None:
            self._file.close()


# --- .pt --------------------------------------------------------------------------------------------------------------


class TorchFile:
    """Writes a state dict as torch.save does, tensor by tensor in the order of the plan.

    torch.save wants all tensors in memory. It can leave out their bytes, however (`torch.serialization.skip_data`):
    the small records of such a skeleton are copied, and the bytes of the tensors follow as they come.
    """

    _ALIGNMENT = 64  # of torch.save, so that tensors can be mapped from the file
    _ZIP64_FROM = 2**31 - 1

    def __init__(self, file: Path, plan: Plan):
        self._plan, self._order = plan, list(plan)
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

    def write(self, name: str, tensor: Tensor) -> None:
        """Appends the next tensor of the plan: the n-th is the record data/n."""
        number = self._order.index(name)
        assert Spec(tuple(tensor.shape), tensor.dtype) == self._plan[name], f"{name} is not as planned"
        record = zipfile.ZipInfo(f"archive/data/{number}")
        large = tensor.nbytes >= self._ZIP64_FROM
        # A local header is 30 bytes, the name, and extra fields: 20 bytes for large sizes, and our padding.
        start = self._zip.start_dir + 30 + len(record.filename) + (20 if large else 0) + 4
        padding = -start % self._ALIGNMENT
        record.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
        with self._zip.open(record, "w", force_zip64=large) as target:
            target.write(_bytes_of(tensor))

    def close(self) -> None:
        """Writes the table of contents."""
        self._zip.close()


# --- Orbax ------------------------------------------------------------------------------------------------------------


class OrbaxFolder:
    """Writes an Orbax checkpoint with one zarr folder per array, array by array, with the outer `params`.

    Orbax saves whole trees from memory. This layout, which every version of it reads, is arrays that tensorstore can
    write one at a time, and a description of the tree.
    """

    _CHUNK_BYTES = 64 * 2**20

    def __init__(self, folder: Path, plan: Plan):
        folder.mkdir()
        self._folder, self._plan = folder, plan
        leaves = {}
        for name in plan:
            keys = ("params", *_tree_keys(name))
            leaves[str(keys)] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],
                # As a NumPy array it is restored without a word about devices, and as a jax.Array where that is asked.
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

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one array of the plan."""
        import ml_dtypes
        import tensorstore

        assert Spec(tuple(tensor.shape), tensor.dtype) == self._plan[name], f"{name} is not as planned"
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows = max(1, self._CHUNK_BYTES // (tensor[0].nbytes or 1))
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{self._folder}/params.{name}/"},
            "metadata": {
                "shape": list(tensor.shape),
                "chunks": [min(rows, tensor.shape[0]), *tensor.shape[1:]],
                "dtype": {"float32": "<f4"}.get(dtype, dtype),
                "compressor": {"id": "zstd", "level": 1},
            },
            "store_data_equal_to_fill_value": True,
        }
        array = tensor.contiguous()
        if array.dtype == torch.bfloat16:
            numbers = array.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            numbers = array.numpy()
        tensorstore.open(spec, create=True, write=True).result().write(numbers).result()

    def close(self) -> None:
        """Says that the checkpoint is complete, as Orbax does."""
        (self._folder / "commit_success.txt").write_text("Checkpoint commit was successful.\n")


def _tree_keys(name: str) -> list[str]:
    """The keys of a Flax tree on the way to an array; `blocks.N` is one key."""
    keys = name.split(".")
    return [".".join(keys[:2]), *keys[2:]] if keys[0] == "blocks" else keys
