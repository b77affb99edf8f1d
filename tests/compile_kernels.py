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

from recurrent_gemma_hf import causal_conv1d_triton, rg_lru_step_triton, rg_lru_triton, scan_triton, triton_tools

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOLERATED = 16  # spilled bytes per thread, stores and loads
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


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


FLOAT32 = (
    "decay end last dlast h0 dh0 carries sums log_a".split()  # whatever the dtype of the activations
)


OPTIONAL = [f"{name}_ptr" for name in "h0 reset is_padding conv_tap_mask index decay end".split()]


def cases():
    """The `full_cases`, and each of them with nothing that can be left out: what stands behind `if pointer is None`
    is compiled only then."""
    for name, kernel, dtypes, constants, warps in full_cases():
        yield name, kernel, dtypes, constants, warps
        absent = [pointer for pointer in OPTIONAL if pointer in kernel.arg_names]
        if constants.get("SUMMARY"):
            absent = [pointer for pointer in absent if pointer not in ("decay_ptr", "end_ptr")]
        if "backward" not in name:
            absent += [pointer for pointer in kernel.arg_names if pointer == "carries_ptr"]
        yield f"{name}, bare", kernel, dtypes, {**constants, **dict.fromkeys(absent)}, warps


def full_cases():
    """name, kernel, dtypes of its pointers, constants, warps: with everything that can be there, at the published
    shape (heads 256 wide, four taps); bfloat16 and float32."""
    walk = {"CHANNELS": triton_tools.CHANNELS, "ROWS": triton_tools.UNROLLED}
    steps = {"CHANNELS": triton_tools.CHANNELS, "STEPS": causal_conv1d_triton.STEPS, "K": 4, "PAST": 3}
    for label, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        masks = dict.fromkeys(("reset_ptr", "is_padding_ptr", "conv_tap_mask_ptr"), torch.uint8)
        dtypes = {"x_ptr": dtype, **masks, **{f"{name}_ptr": torch.float32 for name in FLOAT32}}
        for summary in (True, False):
            suffix, constants = f" {label}{', summary' if summary else ''}", {**walk, "SUMMARY": summary}
            yield f"scan{suffix}", scan_triton.scan_kernel, dtypes, constants, 1
            yield f"scan backward{suffix}", scan_triton.scan_backward_kernel, dtypes, constants, 1
            yield f"rg_lru{suffix}", rg_lru_triton.rg_lru_kernel, dtypes, constants, 1
            constants = {**constants, "MIN_4X": 1e-6}
            yield f"rg_lru backward{suffix}", rg_lru_triton.rg_lru_backward_kernel, dtypes, constants, 1
        yield f"conv {label}", causal_conv1d_triton.conv_kernel, dtypes, steps, 4
        yield f"conv backward {label}", causal_conv1d_triton.conv_backward_kernel, dtypes, {**steps, "SUMS": 8}, 4
        module, dtypes = rg_lru_step_triton, {**dtypes, "h_ptr": torch.float32, "index_ptr": torch.int32}
        constants = {"K": 4, "ROWS": module.ROWS, "CHANNELS": module.CONVOLVED}
        yield f"conv step {label}", module.conv_step_kernel, dtypes, constants, module.WARPS
        if dtype == torch.bfloat16:  # float32 takes other kernels
            constants = {"C": 8.0, "UPCAST": False, "HEAD": 256, "CHUNK": module.CHUNK}
            constants |= {"ROWS": module.ROWS, "OUTPUTS": module.OUTPUTS}
            yield f"rg_lru step {label}", module.rg_lru_step_kernel, dtypes, constants, module.WARPS


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
            facts |= {"shared": compiled.metadata.shared, "tolerated": TOLERATED}
            if TARGETS[target].backend == "cuda":
                facts |= registers(compiled, target.replace("90", "90a"))
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
