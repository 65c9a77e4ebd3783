"""Matrix products of 16-bit floats with a fused epilogue: torch.mm and the element-wise functions after it, in one call."""
