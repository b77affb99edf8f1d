"""Evaluation: what `recurrent-gemma eval` runs.

Nothing here is imported before it is used, and a checkpoint carries none of it. lm-eval and matplotlib come with the
extra `eval`.
"""
