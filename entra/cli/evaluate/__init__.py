"""`entra eval`: the command, and how it reads what became of each completion."""
