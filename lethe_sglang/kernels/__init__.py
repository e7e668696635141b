"""Device work: Triton kernels, their torch reference, and the torch that serves both."""
