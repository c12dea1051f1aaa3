"""How the shipped traces (`entra/data`) were made."""
