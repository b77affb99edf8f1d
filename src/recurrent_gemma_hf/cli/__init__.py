"""The `recurrent-gemma` command, with app.py as its entry point. No other part of the package imports this folder."""
