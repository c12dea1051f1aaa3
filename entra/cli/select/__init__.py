"""`entra select`: the command, and how it reads what `entra score` wrote."""
