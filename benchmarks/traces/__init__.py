"""How the shipped traces (`entra/data`) were made, and how public ones of real models are read."""
