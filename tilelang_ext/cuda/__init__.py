"""The CUDA backend: upstream's, with fp8 products on every GPU and operand major."""
