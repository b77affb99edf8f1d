"""Convert checkpoints of the official code to ours and back, bit by bit, and upload them: `recurrent-gemma convert`."""
