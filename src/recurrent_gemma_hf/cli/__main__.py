"""`python -m recurrent_gemma_hf.cli` is the `recurrent-gemma` command."""

from .app import main

main()
