"""Measure converting a checkpoint of the 2B shape (bfloat16, random): peak memory, and speed compared with `cp`.

    python benchmarks/conversion.py FOLDER         # an empty folder with 20 GB free; it is emptied again
    python benchmarks/conversion.py FOLDER --9b    # Orbax to HF at the 9B shape instead: 35 GB free

The official code creates the checkpoints. Before each timing the source is dropped from the page cache; each timing
includes flushing the result to disk. Memory is the peak of a script's process minus the peak of its imports alone;
"without mapped files" excludes the reclaimable pages of the source (sampled every 20 ms). `cp` runs on the same disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from peers import recorded

SCRIPTS = Path(__file__).parents[1] / "conversion"
COLUMNS = [
    *("what", "GB", "seconds", "cp seconds", "share of cp"),
    *("peak GB beyond imports", "without mapped files", "imports GB"),
]

MAKE_ORBAX = """
import jax, numpy as np, orbax.checkpoint, sys
from recurrentgemma import common, jax as official
config = common.GriffinConfig.from_preset(common.Preset.RECURRENT_GEMMA_2B_V1)
model = official.Griffin(config, dtype=jax.numpy.bfloat16, gradient_checkpointing=False)
tokens = jax.ShapeDtypeStruct((1, 4), "int32")
shapes = jax.eval_shape(lambda t: model.init(jax.random.key(0), t, t), tokens)
draw = np.random.default_rng(0)
def random(leaf):
    return jax.numpy.asarray(draw.standard_normal(leaf.shape, np.float32).astype(jax.numpy.bfloat16)) / 64
orbax.checkpoint.PyTreeCheckpointer(use_ocdbt=sys.argv[2] == "ocdbt").save(sys.argv[1], jax.tree.map(random, shapes))
"""
MAKE_PT = """
import sys, torch
from recurrentgemma import common, torch as official
config = common.GriffinConfig.from_preset(common.Preset.RECURRENT_GEMMA_2B_V1)
with torch.device("meta"):
    shapes = official.Griffin(config, gradient_checkpointing=False, dtype=torch.bfloat16).state_dict()
torch.save({name: torch.empty(s.shape, dtype=s.dtype).normal_(std=1 / 64) for name, s in shapes.items()}, sys.argv[1])
"""
# Written layer by layer: the 9B shape is 17 GB. The values repeat beyond the window of Orbax's compressors.
MAKE_ORBAX_9B = """
import jax, json, numpy as np, orbax.checkpoint, pathlib, shutil, sys
from recurrentgemma import common, jax as official
path = pathlib.Path(sys.argv[1])
config = common.GriffinConfig.from_preset(common.Preset.RECURRENT_GEMMA_9B_V1)
model = official.Griffin(config, dtype=jax.numpy.bfloat16, gradient_checkpointing=False)
tokens = jax.ShapeDtypeStruct((1, 4), "int32")
shapes = jax.eval_shape(lambda t: model.init(jax.random.key(0), t, t), tokens)["params"]
drawn = (np.random.default_rng(0).standard_normal(1 << 26, np.float32) / 64).astype(jax.numpy.bfloat16)
whole = None
for key, layer in shapes.items():
    arrays = jax.tree.map(lambda leaf: np.resize(drawn, leaf.shape), layer)
    orbax.checkpoint.PyTreeCheckpointer(use_ocdbt=False).save(path / "part", {"params": {key: arrays}})
    metadata = json.loads((path / "part/_METADATA").read_text())
    whole = whole or metadata
    whole["tree_metadata"].update(metadata["tree_metadata"])
    for folder in (path / "part").glob("params.*"):
        folder.rename(path / folder.name)
    shutil.rmtree(path / "part")
(path / "_METADATA").write_text(json.dumps(whole))
"""
# On Linux getrusage inherits the parent's peak; VmHWM does not.
PEAK = """
import runpy, sys, threading, time
def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
anonymous = [0]
def watch():
    while True:
        anonymous[0] = max(anonymous[0], status("RssAnon"))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
del sys.argv[:1]
try:
    if sys.argv:
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        import filelock, ml_dtypes, tensorstore
        import recurrent_gemma_hf.conversion.convert
        time.sleep(0.1)
finally:
    print("peak kB:", status("VmHWM"), *anonymous)
"""


def run(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def peak_gb(*arguments: object) -> list[float]:
    """Run a conversion script (none: imports only); return its peak memory, with and without mapped files."""
    return [int(kb) * 1024 / 1e9 for kb in run(PEAK, *arguments).split()[-2:]]


def files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def forget(path: Path) -> None:
    """Drop the files from the page cache."""
    for file in files(path):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(source: Path, work) -> tuple[float, float]:
    """Return the seconds until the results of `work()` are on the disk, and the value it returned."""
    forget(source)
    start = time.perf_counter()
    result = work()
    os.sync()
    return time.perf_counter() - start, result


def measure(what: str, script: str, source: Path, target: Path, imports: list[float], *options: str) -> dict:
    copy = source.with_name("copy")
    copying, _ = timed(source, lambda: subprocess.run(["cp", "-r", source, copy], check=True))
    shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
    arguments = [SCRIPTS / f"{script}.py", source, target, *options]
    seconds, peak = timed(source, lambda: peak_gb(*arguments))
    return {
        "what": what,
        "GB": sum(file.stat().st_size for file in files(source)) / 1e9,
        "seconds": seconds,
        "cp seconds": copying,
        "share of cp": copying / seconds,
        "peak GB beyond imports": peak[0] - imports[0],
        "without mapped files": peak[1] - imports[1],
        "imports GB": imports[0],
    }


def large(folder: Path) -> None:
    orbax, hf = folder / "9b", folder / "hf"
    with recorded("conversion_9b", COLUMNS) as record:
        orbax.mkdir()
        run(MAKE_ORBAX_9B, orbax)
        preset = ("--preset", "recurrentgemma-9b")
        record(measure("Orbax (zarr) to HF, 9B", "orbax_to_hf", orbax, hf, peak_gb(), *preset))
        shutil.rmtree(orbax)
        shutil.rmtree(hf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--9b", action="store_true", dest="large")
    given = parser.parse_args()
    folder = given.folder.absolute()
    if any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    if given.large:
        return large(folder)
    preset = ("--preset", "recurrentgemma-2b")
    orbax, pt, hf, back = (folder / name for name in ("2b", "2b.pt", "hf", "back"))
    with recorded("conversion_2b", COLUMNS) as record:
        imports = peak_gb()
        for layout in ("zarr", "ocdbt"):
            run(MAKE_ORBAX, orbax, layout)
            record(measure(f"Orbax ({layout}) to HF", "orbax_to_hf", orbax, hf, imports, *preset))
            shutil.rmtree(orbax)
            if layout == "zarr":
                record(measure("HF to Orbax", "hf_to_orbax", hf, back, imports))
                shutil.rmtree(back)
                record(measure("HF to .pt", "hf_to_torch", hf, back, imports))
                back.unlink()
            shutil.rmtree(hf)
        run(MAKE_PT, pt)
        record(measure(".pt to HF", "torch_to_hf", pt, hf, imports, *preset))
        pt.unlink()
        shutil.rmtree(hf)


if __name__ == "__main__":
    main()
