"""Types: each row converts a number to a type and back; it is exact in every one of them."""

import numpy as np
from language.table.rows import Row

from tilelang_ext import language

# What targets have no type for, or cannot convert.
_NO_TYPE = r"dtype: .+ has no .+; got .+; use .+"
_LACKING = {
    "all": "float8_e3m4 float8_e4m3b11fnuz float6_e2m3fn float6_e3m2fn int4 float4_e2m1_unpacked",
    "apple": "float64 double",
    "hip": "tfloat32 float8_e8m0fnu float4_e2m1fn",
    "c": "tfloat32 float4_e2m1fn",
}


def _row(name: str) -> Row:
    def emit(T, x, y, n, m):
        return language.cast(language.cast(language.cast(m % 2 + 1, "float32"), getattr(T, name)), "float32")

    refused = {target: _NO_TYPE for target, names in _LACKING.items() if name in names.split()}
    return Row(name, emit, lambda x, y, n, m: (m % 2 + 1).astype(np.float64), refused=refused)


ROWS = [
    _row(name)
    for name in [
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "bfloat16",
        "float32",
        "half",
        "float",
        "int",
        "uint",
        "short",
        "long",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e4m3",
        "float8_e8m0fnu",
        "float4_e2m1fn",
        "tfloat32",
        "float64",
        "double",
        "float8_e3m4",
        "float8_e4m3b11fnuz",
        "float6_e2m3fn",
        "float6_e3m2fn",
        "int4",
        "float4_e2m1_unpacked",
    ]
]
ROWS.append(
    Row(
        "bool",
        lambda T, x, y, n, m: language.cast(language.cast(m % 2, T.bool), "float32"),
        lambda x, y, n, m: (m % 2).astype(np.float64),
    )
)
