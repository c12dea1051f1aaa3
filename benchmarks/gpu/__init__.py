"""What a machine with a GPU is used for while it is there: `make gpu`, `make gpu-again`."""
