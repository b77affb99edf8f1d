"""How long does the linear recurrence take on this CPU, beside the loop over time and the memory's own speed?

    OMP_NUM_THREADS=2 python benchmarks/scan_cpu.py

The floor is what a scan must move at least, at the speed of a copy measured in the same run: forward reads x and a and
writes h (1.5 copies), backward reads dh, a and h and writes dx and da (2.5 copies). The copy writes to memory in use,
while a scan's results are new memory, which the system must first map; that is part of the distance. Run it on a quiet
machine: with more threads than free cores every operation waits for the slowest thread.
"""

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from recurrent_gemma_hf.linear_recurrence import linear_recurrence

SHAPES = ((1, 1024, 512), (1, 4096, 2560), (1, 16384, 512))
CHUNKS = (8, 16, 32, 64, 128)
module = sys.modules["recurrent_gemma_hf.linear_recurrence"]


def milliseconds(run: Callable[[], object], repeats: int = 9) -> tuple[float, float]:
    """Median and best wall time of a call, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)[repeats // 2], min(times)


def forward(inputs: tuple[torch.Tensor, ...], backend: str) -> None:
    """One inference call."""
    with torch.no_grad():
        linear_recurrence(*inputs, backend=backend)


def forward_and_backward(inputs: tuple[torch.Tensor, ...], backend: str) -> None:
    """One training call, with all three gradients through both results."""
    h_BTD, h_last_BD = linear_recurrence(*inputs, backend=backend)
    torch.autograd.grad((h_BTD, h_last_BD), inputs, (torch.ones_like(h_BTD), torch.ones_like(h_last_BD)))


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def report(shape: tuple[int, int, int]) -> None:
    """Print the times of one shape: median (best) in milliseconds."""
    x = torch.randn(shape)
    inputs = (x.requires_grad_(), torch.rand(shape).requires_grad_(), torch.randn(shape[0], shape[2]).requires_grad_())
    target = torch.empty(shape)
    copy, copy_best = milliseconds(lambda: target.copy_(x.detach()))
    print(f"\nB, T, D = {shape}, float32; copy of one tensor {copy:.2f} ({copy_best:.2f}) ms")
    for title, run, copies in (("forward", forward, 1.5), ("forward + backward", forward_and_backward, 4.0)):
        loop, loop_best = milliseconds(lambda run=run: run(inputs, "reference"), repeats=3)
        scan, scan_best = milliseconds(lambda run=run: run(inputs, "chunked"))
        print(
            f"  {title:18s} chunked {scan:8.2f} ({scan_best:7.2f}) ms   loop {loop:9.2f} ({loop_best:8.2f}) ms   "
            f"loop / chunked {loop_best / scan_best:5.1f}   chunked / floor {scan_best / (copies * copy_best):5.1f}"
        )
    default = module._MAX_CHUNK
    for chunk in CHUNKS:
        module._MAX_CHUNK = chunk
        scan, scan_best = milliseconds(lambda: forward(inputs, "chunked"))
        print(f"  forward, chunks of at most {chunk:3d} steps: {scan:8.2f} ({scan_best:7.2f}) ms")
    module._MAX_CHUNK = default


if __name__ == "__main__":
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; median (best) times")
    torch.manual_seed(0)
    for shape in SHAPES:
        report(shape)
    step = (torch.randn(1, 1, 2560), torch.rand(1, 1, 2560), torch.randn(1, 2560))
    median, best = milliseconds(lambda: forward(step, "auto"), repeats=999)
    print(f"\none step of decoding, D = 2560: {median * 1e3:.1f} ({best * 1e3:.1f}) us")
