"""Plans, variants and tensors that tests of plans share."""

import torch
from launch.fakes import launch, tensor

from tilelang_ext.launch.expression import ceildiv, recipe_of, shape

NINE = [f"x{i}" for i in range(9)]


def of_x(cuda, steps=(), **variant):
    """A plan of one tensor x, of one dimension."""
    return cuda.plan("x", {"x": "tensor"}, {"tensors": [tensor("x", [None])], "steps": list(steps), **variant})


def one_kernel(*parameters, **others):
    return launch("one_kernel", list(parameters), **others)


def recipe(*parts):
    return [recipe_of(part) for part in parts]


def nine_tensors(cuda):
    """A kernel of nine tensors (n, 64), a block for each 8 rows, and n."""
    n = shape("x0", 0)
    rules = [tensor(name, [None if name == "x0" else n.recipe, 64], strides=[64, 1]) for name in NINE]
    parameters = [*(["pointer", name, 0] for name in NINE), ["int32", n.recipe]]
    step = launch("add_kernel", parameters, recipe(ceildiv(n, 8), 2, 1), shared_bytes=4096)
    return cuda.plan("add", dict.fromkeys(NINE, "tensor"), {"tensors": rules, "steps": [step]})


def tensors(rows=20):
    return [torch.randn(rows, 64) for _ in NINE]


def addresses(given):
    return [x.data_ptr() for x in given]


def with_descriptor(cuda):
    """A descriptor of x (n, 128) by tiles of 64 rows, and of its half of the columns from 64 on."""
    tensor_map = {
        "of": "x",
        "offset": 0,
        "dtype": 7,
        "extents": recipe(128, shape("x", 0)),
        "strides": recipe(shape("x", 1) * 4),
        "box": [32, 64],
        "element_strides": [1, 1],
        "interleave": 0,
        "swizzle": 3,
        "l2_promotion": 2,
        "fill": 0,
    }
    parameters = [["tensor_map", tensor_map], ["int32", 1], ["tensor_map", {**tensor_map, "offset": 256}]]
    variant = {"tensors": [tensor("x", [None, 128], strides=[128, 1])], "steps": [launch("one_kernel", parameters)]}
    return cuda.plan("x", {"x": "tensor"}, variant)
