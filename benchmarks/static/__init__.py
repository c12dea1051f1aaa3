"""What the compilers made of the kernels, counted without a GPU, and the tuner of launch sizes."""
