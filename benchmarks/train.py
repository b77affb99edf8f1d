"""Time one training step (forward, loss, gradients) on rows of T tokens: ours and the peers.

    python benchmarks/train.py [--device cuda] [--lengths 2048 8192] [--batch 1] [--checkpoint]

"share of peak": floating-point operations of the model (three times those of its forward pass) over those of a large
matmul in the same time. Recomputation (`--checkpoint`, the default of the official code) does not count.
"""

from __future__ import annotations

from run_peers import run

LENGTHS = {"cuda": [2048, 8192], "cpu": [1024, 4096, 16384]}

if __name__ == "__main__":
    run("train", __doc__, LENGTHS, lambda peer, ids: peer.train(ids), training=True)
