"""The `recurrent-gemma` command: app.py is its head, and each subject has a file. Nothing else imports this folder."""
