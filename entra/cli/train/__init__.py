"""`entra train`: the command, its data, its reward functions, its checkpoints."""
