"""Whole kernels behind torch functions: which blocking, which checks at the door."""
