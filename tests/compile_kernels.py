"""Compiles Triton kernels for GPUs that are not here, and says what they take.

    python tests/compile_kernels.py [--targets sm_90,sm_80,gfx942] [part of a name ...]

Run as a program, because it needs the compiler where the tests need the interpreter. One JSON line per kernel and
target: registers and spilled bytes per thread (by NVIDIA's assembler, which comes with triton), shared memory.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from recurrent_gemma_hf import recurrent_block_triton, scan_triton

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Spilled bytes per thread (stores and loads) that are known and written down in benchmarks/LOG.md; others: 16.
TOLERATED = {
    "summary bf16": 24,
    "block bf16": 450,
    "block bf16, summary": 1700,
    "block backward bf16": 950,
    "block backward bf16, summary": 1900,
    "block fp32, summary": 200,
    "block backward fp32": 100,
    "block backward fp32, summary": 400,
    "decode fp32": 240,
}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8"}


def signature_of(kernel, constants: dict, dtypes: dict) -> dict[str, str]:
    """Types of a kernel's arguments by their names: pointers from `dtypes` (default: the first), sizes int32."""
    default = next(iter(dtypes.values()))
    return {
        name: "constexpr" if name in constants
        else POINTERS[dtypes.get(name, default)] if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
    }  # fmt: skip


def compile_kernel(kernel, target: GPUTarget, constants: dict, dtypes: dict, warps: int):
    """With all addresses and the sizes that Triton looks at multiples of 16, as at the published shapes."""
    signature = signature_of(kernel, constants, dtypes)
    unknown = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name not in constants and name not in unknown
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(
        source, target=target, options={"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    )


def registers(compiled, capability: str) -> dict[str, int]:
    """What NVIDIA's assembler says of the compiled kernel."""
    ptxas = get_ptxas(int(re.search(r"\d+", capability)[0])).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.asm["ptx"])
        command = [ptxas, "-v", f"--gpu-name={capability}", source, "-o", Path(folder, "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
        text = done.stdout + done.stderr
        if done.returncode:
            raise RuntimeError(text)
    used = int(re.search(r"Used (\d+) registers", text)[1])
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", text)]
    return {"registers": used, "spilled": sum(spilled)}


def scan_cases():
    module, bf16, fp32, u8 = scan_triton, torch.bfloat16, torch.float32, torch.uint8
    summaries = {"decay_ptr": fp32, "end_ptr": fp32, "reset_ptr": u8, "last_ptr": fp32, "dh_last_ptr": fp32}
    for name, x_dtype in (("bf16", bf16), ("fp32", fp32)):
        dtypes = {"x_ptr": x_dtype, **summaries, "h0_ptr": fp32, "dh0_ptr": fp32}
        for has_reset in (False, True):
            label = f"{name}{', resets' if has_reset else ''}"
            flags = {"REVERSE": has_reset, "HAS_RESET": has_reset}
            yield f"summary {label}", module.summary_kernel, dtypes, flags, module.SUMMARY_TILE
            yield f"scan {label}", module.scan_kernel, dtypes, {**flags, "HAS_H0": True}, module.FORWARD_TILE
            flags = {"HAS_RESET": has_reset, "HAS_H0": True}
            yield f"scan backward {label}", module.scan_backward_kernel, dtypes, flags, module.BACKWARD_TILE


def block_cases():
    """The published shape: heads 256 wide, four taps, everything that can be there; bfloat16 and float32."""
    module, fp32, u8 = recurrent_block_triton, torch.float32, torch.uint8
    names = "h0 softplus decay end last carries dlast dh0 sums h".split()
    for label, dtype in (("bf16", torch.bfloat16), ("fp32", fp32)):
        dtypes = {"u_ptr": dtype, "reset_ptr": u8, "is_padding_ptr": u8, **{f"{name}_ptr": fp32 for name in names}}
        index = int(dtype == fp32)
        common = {"HAS_CONTEXT": False, "HAS_RESET": True, "HAS_PADDING": False, "HAS_CONV_TAP_MASK": True, "K": 4}
        gates = {**common, "HEAD": 256, "CHUNK": module.CHUNK, "UPCAST": False}
        forward, backward = module.FORWARD_TILES[index], module.BACKWARD_TILES[index]
        for summary in (True, False):
            suffix = f" {label}{', summary' if summary else ''}"
            constants = {**gates, "SUMMARY": summary, "TIME": forward.time, "CHANNELS": forward.channels}
            yield f"block{suffix}", module.block_kernel, dtypes, {**constants, "HAS_H0": True}, forward.warps
            constants = {**gates, "SUMMARY": summary, "TIME": backward.time, "CHANNELS": backward.channels}
            yield f"block backward{suffix}", module.block_backward_kernel, dtypes, constants, backward.warps
        tile = module.CONV_TILE
        constants = {
            "HAS_CONTEXT": True,
            "HAS_CONV_TAP_MASK": True,
            "K": 4,
            "TIME": tile.time,
            "CHANNELS": tile.channels,
        }
        yield f"conv {label}", module.conv_kernel, dtypes, constants, tile.warps
        yield f"conv backward {label}", module.conv_backward_kernel, dtypes, {**constants, "SUMS": 8}, tile.warps
        tile = module.DECODE_TILES[index]
        constants = {name: value for name, value in gates.items() if name not in ("HAS_CONTEXT", "CHUNK")}
        constants |= {"HAS_PADDING": True, "ROWS": tile.time, "CHANNELS": tile.channels}
        yield f"decode {label}", module.decode_kernel, dtypes, constants, tile.warps


def cases():
    """name, kernel, dtypes of its pointers, constants, warps."""
    for name, kernel, dtypes, flags, tile in scan_cases():
        constants = {**flags, "TIME": tile.time, "CHANNELS": tile.channels, "STAGES": tile.stages}
        yield name, kernel, dtypes, constants, tile.warps
    yield from block_cases()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("parts", nargs="*")
    options = parser.parse_args()
    for name, kernel, dtypes, constants, warps in cases():
        if not all(part in name for part in options.parts):
            continue
        for target in options.targets.split(","):
            compiled = compile_kernel(kernel, TARGETS[target], constants, dtypes, warps)
            facts = {"kernel": name, "function": kernel.fn.__name__, "target": target, "warps": warps}
            facts |= {"shared": compiled.metadata.shared, "tolerated": TOLERATED.get(name, 16)}
            if TARGETS[target].backend == "cuda":
                facts |= registers(compiled, target.replace("90", "90a"))
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
