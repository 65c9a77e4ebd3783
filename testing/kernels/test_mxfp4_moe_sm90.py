"""The mixture of experts on Hopper: values by running the CUDA text on the CPU, the machine code, what is refused."""

import functools

import pytest
import torch
from cuda.execute import needs_compiler
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.hopper import Box, execute
from numeric import assert_close
from tilelang import tvm
from tilelang.engine.lower import lower
from tvm.target import Target

from tilelang_ext import reference
from tilelang_ext.formats import E2M1, BlockScaledLayout
from tilelang_ext.kernels import mxfp4_moe_sm90 as many
from tilelang_ext.kernels import mxfp4_moe_sm90_few as few
from tilelang_ext.kernels import mxfp4_moe_sm90_launch as launch
from tilelang_ext.kernels.mxfp4_moe import mxfp4_moe
from tilelang_ext.kernels.mxfp4_moe_sm90_tiles import TILE
from tilelang_ext.kernels.mxfp4_moe_stages import Activation
from tilelang_ext.kernels.mxfp4_moe_weights import prepare_mxfp4_weights, tile_for_hopper

EXPERTS, TOKENS, TOP_K, H, I = 3, 5, 2, 96, 160  # K of one step and a half, and of two and a half; rows that fill no tile


def text_of(module, prim_func, name="product"):
    target = Target({"kind": "cuda", "arch": launch.ARCH})
    with tvm.transform.PassContext(config=module.PASS_CONFIGS), target:
        return lower(prim_func.with_attr("global_symbol", name), target=target, enable_device_compile=False).kernel_source


class Case:
    """Random weights, padded with poison, and the routing of a block for each of two experts; one has no token."""

    def __init__(self, block_M):
        generator = torch.Generator().manual_seed(0)

        def weights(rows, k, padding, gate):
            codes = torch.randint(0, 256, (EXPERTS, rows + padding, k // 2 + 16), generator=generator, dtype=torch.uint8)
            scale = torch.randint(118, 129, (EXPERTS, rows + padding, k // 32 + 1), generator=generator, dtype=torch.uint8)
            bias = torch.randn(EXPERTS, rows + padding, generator=generator)
            return prepare_mxfp4_weights(codes, scale, bias, gate=gate, rows=rows, k=k)

        self.w13, self.w2 = weights(2 * I, H, 64, "separated"), weights(H, I, 32, None)
        self.x = torch.randn(TOKENS, H, generator=generator).bfloat16()
        self.block_M = block_M
        none = TOP_K << 24 | TOKENS
        self.token_ids = torch.full((3 * block_M,), none, dtype=torch.int32)
        rows = {0: (0, 0), 1: (3, 1), block_M: (4, 0), block_M + 1: (1, 1), block_M + 2: (0, 1)}  # row: token, slot
        for row, (token, slot) in rows.items():
            self.token_ids[row] = slot << 24 | token
        self.rows = rows
        self.weights = torch.rand(3 * block_M, generator=generator)
        self.expert_ids = torch.tensor([2, 0, -1], dtype=torch.int32)
        self.num_valid = torch.tensor([2 * block_M], dtype=torch.int32)

    @functools.cached_property
    def expected_hidden(self):
        """Of the rows that have a token, float64."""
        half = self.w13.codes.shape[1] // 2
        order = torch.cat([torch.arange(I), half + torch.arange(I)])
        matrix = dequantized(self.w13)[:, order, :H]
        rows = []
        for row, (token, _) in self.rows.items():
            expert = self.expert_ids[row // self.block_M]
            both = matrix[expert] @ self.x[token].double() + self.w13.bias[expert][order].double()
            rows.append(reference.swiglu(both[None], gate="separated")[0])
        return torch.stack(rows)

    def expected(self, hidden):
        """(tokens, top_k, H) of `hidden`, NaN where no row has the slot."""
        matrix, y = dequantized(self.w2)[:, :H, :I], torch.full((TOKENS, TOP_K, H), torch.nan, dtype=torch.float64)
        for row, (token, slot) in self.rows.items():
            expert = self.expert_ids[row // self.block_M]
            result = matrix[expert] @ hidden[row].double() + self.w2.bias[expert, :H].double()
            y[token, slot] = result * self.weights[row].double()
        return y


def dequantized(weights):
    return reference.dequantize(weights.codes, weights.scale, E2M1, BlockScaledLayout.e8m0_k32())


def run(module, config, row_blocks):
    """Both products; `row_blocks` (w13, w2) of weights each."""
    case = Case(config.block_M)
    w13, w2 = tile_for_hopper(case.w13, gate=True), tile_for_hopper(case.w2, gate=False)
    gathers = module is few
    x = case.x if gathers else case.x[(case.token_ids & 0xFFFFFF).clamp(max=TOKENS - 1)]
    tensors = {
        "x": x, "token_ids": case.token_ids, "weights": case.weights, "expert_ids": case.expert_ids,
        "num_valid": case.num_valid,
        "hidden": torch.full((len(case.token_ids), I), torch.nan).bfloat16(), "y": torch.full((TOKENS, TOP_K, H), torch.nan),
    }  # fmt: skip
    boxes = {name: Box(config.block_M, TILE) for name in ("x", "hidden")}
    names = {"gate_up": ["x", "expert_ids", "num_valid", "hidden"], "down": list(tensors)[1:]}
    if gathers:
        names["gate_up"].append("token_ids")
    for name, weights, blocks in (("gate_up", w13, row_blocks[0]), ("down", w2, row_blocks[1])):
        arguments = (Activation(),) if name == "gate_up" else ("reduce",)
        suffix = "13" if name == "gate_up" else "2"
        own = {each: tensors[each] for each in names[name]}
        own |= {f"w{suffix}": weights.codes, f"bias{suffix}": weights.bias}
        scalars = {
            "tokens": TOKENS, "top_k": TOP_K, "H": H, "groups": I // 32, "hidden_groups": H // 32, "blocks": 3,
            "experts": EXPERTS, "lines": weights.codes.numel() // 4, "row_tiles": weights.codes.shape[1],
            "steps": weights.codes.shape[2],
        }  # fmt: skip
        execute(text_of(module, getattr(module, name)(config, *arguments)), (blocks, 3), own, boxes, scalars)
        tensors |= {each: own[each] for each in names[name]}
    rows = list(case.rows)
    assert_close(tensors["hidden"][rows], case.expected_hidden, dtype="bfloat16")
    expected = case.expected(tensors["hidden"])
    written = ~expected.isnan()
    assert torch.equal(tensors["y"].isnan(), ~written)
    assert_close(tensors["y"][written], expected[written], dtype="float32", max_error=1e-5, rms_error=1e-5)


@needs_compiler
@pytest.mark.parametrize(("module", "config"), [(few, few.Config(16, 4, 2, 1)), (many, many.Config(32, 2, 3))], ids=str)
def test_values(module, config):
    run(module, config, (-(-2 * I // config.rows), -(-H // config.rows)))


@needs_compiler
def test_gather():
    """Rows of two blocks of threads each; padding and what lies past num_valid stay as they are."""
    rows, H = 5, 1056
    tensors = {
        "x": torch.randn(3, H).bfloat16(),
        "token_ids": torch.tensor([2, 1 << 24, 1 << 24 | 2, 2 << 24 | 3, 1], dtype=torch.int32),
        "num_valid": torch.tensor([4], dtype=torch.int32),
        "gathered": torch.full((rows, H), 7.0).bfloat16(),
    }
    expected = tensors["gathered"].clone()
    expected[:3] = tensors["x"][[2, 0, 2]]
    scalars = {"tokens": 3, "groups": H // 32, "rows": rows}
    execute(text_of(few, launch.gather()), (rows, 2), tensors, {}, scalars)
    assert torch.equal(tensors["gathered"], expected)


@needs_nvcc
def test_instructions():
    """Products of a warp and of a warpgroup, decoded with one multiplication a pair; nothing spilled but a word or two."""
    texts = {}
    for module, config in [launch._TABLE[1][2:], launch._TABLE[-1][2:]]:  # few, many
        name = module.__name__.rpartition(".")[2]
        for stage, prim_func in (("gate_up", module.gate_up(config, Activation())), ("down", module.down(config, "reduce"))):
            texts[f"{name}_{stage}"] = text_of(module, prim_func, f"{name}_{stage}")
    for name, program in compile_texts(texts, launch.ARCH).items():
        assert program.spilled <= 32, name
        assert program.count("HGMMA" if "few" not in name else "HMMA") > 0, name
        assert program.count("HMUL2") > 0, name


def test_what_is_refused():
    weights = Case(8).w13
    loud = weights._replace(scale=torch.full_like(weights.scale, 129))
    with pytest.raises(ValueError, match=r"tile_for_hopper: E8M0 scales must be at most 128, 2\^1; got 129"):
        tile_for_hopper(loud, gate=True)
    case = Case(8)
    w13, w2 = tile_for_hopper(case.w13, gate=True), tile_for_hopper(case.w2, gate=False)
    ids, topk_weights = torch.zeros(TOKENS, 1, dtype=torch.int32), torch.ones(TOKENS, 1)
    with pytest.raises(ValueError, match="w13 and w2 must both be of tile_for_hopper or neither"):
        mxfp4_moe(case.x, ids, topk_weights, w13, case.w2, activation=Activation())
    with pytest.raises(NotImplementedError, match="take bfloat16 activations"):
        mxfp4_moe(case.x.half(), ids, topk_weights, w13, w2, activation=Activation())
    with pytest.raises(NotImplementedError, match=r"are for NVIDIA GPUs of compute capability 9\.0"):
        mxfp4_moe(case.x, ids, topk_weights, w13, w2, activation=Activation())
