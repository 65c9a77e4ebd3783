"""FP8 scaled matmul: torch.nn.functional.scaled_mm from kernels of this package."""
