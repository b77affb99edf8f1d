"""Time the prefill of T tokens, batch B: ours, the peers, and the share of the machine's matmul throughput.

    python benchmarks/prefill.py [--device cuda] [--lengths 2048 8192 65536] [--peers ours gemma]

"share of peak": floating-point operations of the model over those of a large matmul in the same time.
"""

from __future__ import annotations

from run_peers import run

LENGTHS = {"cuda": [2048, 8192, 32768, 65536], "cpu": [1024, 4096, 16384]}

if __name__ == "__main__":
    run("prefill", __doc__, LENGTHS, lambda peer, ids: peer.prefill(ids), training=False)
