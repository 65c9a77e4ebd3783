"""The CUDA backend: upstream's, with `T.gemm` on fp8 operands for every GPU and for K-major and MN-major operands."""
