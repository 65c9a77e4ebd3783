"""Names whose tests stand elsewhere, since each has a page of its own: by target, the file that executes them."""

_INTRINSICS = {
    "e8m0_to_float": "testing/language/test_fp8_scaled_matmul.py",
    "fp8_scaled_matmul": "testing/language/test_fp8_scaled_matmul.py",
    "gemm_blockscaled": "testing/language/blockscaled_cases.py",
    "moe_gather": "testing/language/test_moe_tiles.py",
    "moe_scatter": "testing/language/test_moe_tiles.py",
    "mx_quantize": "testing/language/test_mxfp4_quantize.py",
    "mxfp4_dequant": "testing/language/test_mxfp4_dequant.py",
    "mxfp4_scaled_matmul": "testing/language/test_mxfp4_scaled_matmul.py",
    "silu_mul": "testing/language/test_moe_tiles.py",
    "swiglu": "testing/language/test_moe_tiles.py",
    "make_tensor": "testing/language/test_table.py",
    "Kernel": "testing/language/table/statements.py",
}


def files() -> dict[str, str]:
    """Return the file by name; each executes its name on every target of `mx_run.TARGETS`, or on all of the table."""
    return dict(_INTRINSICS)
