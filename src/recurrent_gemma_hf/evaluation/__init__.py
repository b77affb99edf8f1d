"""Evaluation: what `recurrent-gemma eval` runs.

The commands import these files on use, and the code in a checkpoint has none of them. lm-eval and matplotlib come with
the extra `eval`.
"""
