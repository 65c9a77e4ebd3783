"""The mixture of experts on Hopper: values by running the CUDA text on the CPU, the machine code, what is refused."""

import types

import pytest
import tilelang
import torch
from cuda.execute import needs_compiler
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.hopper import Box, execute
from kernels.mxfp4_moe.sm90_cases import ARCH, quantized, text_of
from numeric import assert_close
from tilelang import tvm

from tilelang_ext import reference
from tilelang_ext.formats import E2M1, BlockScaledLayout
from tilelang_ext.kernels.mxfp4_moe import operator as door
from tilelang_ext.kernels.mxfp4_moe import sm90_launch as launch
from tilelang_ext.kernels.mxfp4_moe import sm90_mma as few
from tilelang_ext.kernels.mxfp4_moe import sm90_scatter as rows
from tilelang_ext.kernels.mxfp4_moe import sm90_wgmma as many
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.launch import launch as launch_all
from tilelang_ext.kernels.mxfp4_moe.operator import mxfp4_moe
from tilelang_ext.kernels.mxfp4_moe.routing import moe_sort
from tilelang_ext.kernels.mxfp4_moe.sm90_packing import OPERANDS, TILE
from tilelang_ext.kernels.mxfp4_moe.weights import prepare_mxfp4_weights, tile_for_hopper

EXPERTS, TOKENS, TOP_K = 3, 5, 2
H, I = 96, 160  # K of one step and a half, and of two and a half; rows that fill no tile
LONG = (288, 416)  # the same in steps of E4M3, more than a ring has stages


class Case:
    """Random weights, padded with poison, and the routing of a block for each of two experts; one has no token."""

    def __init__(self, block_M, H=H, I=I):
        self.H, self.I = H, I
        generator = torch.Generator().manual_seed(0)

        def weights(rows, k, padding, gate):
            codes = torch.randint(0, 256, (EXPERTS, rows + padding, k // 2 + 16), generator=generator, dtype=torch.uint8)
            scale = torch.randint(118, 129, (EXPERTS, rows + padding, k // 32 + 1), generator=generator, dtype=torch.uint8)
            bias = torch.randn(EXPERTS, rows + padding, generator=generator) * (1 if gate else 300)  # as large as products
            return prepare_mxfp4_weights(codes, scale, bias, gate=gate, rows=rows, k=k)

        self.w13, self.w2 = weights(2 * I, H, 64, "separated"), weights(H, I, 32, None)
        self.x = (torch.randn(TOKENS, H, generator=generator) * torch.exp2(torch.arange(TOKENS) - 2.0)[:, None]).bfloat16()
        self.block_M = block_M
        self.rows = {
            0: (0, 0),
            block_M - 1: (3, 1),
            block_M: (4, 0),
            block_M + 1: (1, 1),
            block_M + 2: (0, 1),
        }  # row: token, slot
        self.token_ids = torch.full((3 * block_M,), TOP_K << 24 | TOKENS, dtype=torch.int32)
        self.positions = torch.full((TOKENS, TOP_K), -1, dtype=torch.int32)
        for row, (token, slot) in self.rows.items():
            self.token_ids[row] = slot << 24 | token
            self.positions[token, slot] = row
        self.weights = torch.rand(3 * block_M, generator=generator)
        self.expert_ids = torch.tensor([2, 0, -1], dtype=torch.int32)
        self.num_valid = torch.tensor([2 * block_M], dtype=torch.int32)

    def expected_hidden(self, x):
        """Of x (tokens, H) and the rows that have a token, float64."""
        half = self.w13.codes.shape[1] // 2
        order = torch.cat([torch.arange(self.I), half + torch.arange(self.I)])
        matrix = dequantized(self.w13)[:, order, : self.H]
        rows = []
        for row, (token, _) in self.rows.items():
            expert = self.expert_ids[row // self.block_M]
            both = matrix[expert] @ x[token].double() + self.w13.bias[expert][order].double()
            rows.append(reference.swiglu(both[None], gate="separated")[0])
        return torch.stack(rows)

    def expected(self, hidden):
        """(tokens, top_k, H) of `hidden`, NaN where no row has the slot."""
        matrix = dequantized(self.w2)[:, : self.H, : self.I]
        y = torch.full((TOKENS, TOP_K, self.H), torch.nan, dtype=torch.float64)
        for row, (token, slot) in self.rows.items():
            expert = self.expert_ids[row // self.block_M]
            result = matrix[expert] @ hidden[row].double() + self.w2.bias[expert, : self.H].double()
            y[token, slot] = result * self.weights[row].double()
        return y


def dequantized(weights):
    return reference.dequantize(weights.codes, weights.scale, E2M1, BlockScaledLayout.e8m0_k32())


def run(module, config, kind, H, I):
    """What lies before the products, both of them, and what lies between, each against float64 of what it was given."""
    case = Case(config.block_M, H, I)
    w13, w2 = (tile_for_hopper(w, gate=gate, a_dtype=kind) for w, gate in ((case.w13, True), (case.w2, False)))
    operand, capacity = OPERANDS[kind], len(case.token_ids)
    tensors = {
        "token_ids": case.token_ids, "weights": case.weights, "expert_ids": case.expert_ids, "num_valid": case.num_valid,
        "positions": case.positions, "x": case.x,
        "w13": w13.codes, "scale13": w13.scale, "bias13": w13.bias, "w2": w2.codes, "scale2": w2.scale, "bias2": w2.bias,
        "hidden": torch.full((capacity, I), torch.nan).bfloat16(),
        "y": torch.full((TOKENS, TOP_K, H), torch.nan).bfloat16(),
    }  # fmt: skip
    boxes = {name: Box(config.block_M, operand.K) for name in ("x", "hidden")}

    def execute_one(own_module, prim_func, grid, **changed):
        scalars = {
            "tokens": TOKENS, "top_k": TOP_K, "blocks": 3, "rows": capacity, "slots": TOKENS * TOP_K, "experts": EXPERTS,
        }  # fmt: skip
        own = tensors | changed
        weights = own["w13"] if prim_func.attrs["global_symbol"] == "gate_up" else own["w2"]
        scalars |= {"lines": weights.numel() // 4, "row_tiles": weights.shape[1], "steps": weights.shape[2]}
        scalars |= {"scaled_rows": weights.shape[1] * TILE, **own.pop("sizes")}
        execute(text_of(own_module, prim_func), grid, own, boxes, scalars)

    x, scale_x, sorted_x = case.x, torch.empty(0), torch.full((capacity, H), torch.nan).bfloat16()
    if kind == "fp8":
        codes, scale = quantized(case.x)
        x = codes.double() * scale[:, None].double()
        sorted_x, scale_x = sorted_x.to(codes.dtype), torch.full((capacity,), torch.nan)
        changed = {"codes": sorted_x, "scale": scale_x, "sizes": {"groups": H // 32}}
        execute_one(rows, rows.scatter_quantized(H), (TOKENS, 1), **changed)
        used = torch.full((capacity,), -1)
        used[list(case.rows)] = torch.tensor([token for token, _ in case.rows.values()])
        assert torch.equal(sorted_x.view(torch.uint8)[used >= 0], codes.view(torch.uint8)[used[used >= 0]])
        assert torch.equal(scale_x[used >= 0], scale[used[used >= 0]])
        assert scale_x[used < 0].isnan().all()
    elif module is many:
        execute_one(rows, rows.scatter(), (TOKENS, 1), sorted_x=sorted_x, sizes={"groups": H // 32})
    if module is few:
        sorted_x = case.x
    sizes = {"groups": I // 32, "hidden_groups": H // 32, "H": H}
    gate_up = module.gate_up(config, Activation(), *([operand] if module is many else []))
    grid = (many.num_processors(), 1) if module is many else (-(-2 * I // config.rows), 3)
    execute_one(module, gate_up, grid, x=sorted_x, scale_x=scale_x, sizes=sizes)
    used = list(case.rows)
    assert_close(tensors["hidden"][used], case.expected_hidden(x), dtype="bfloat16")
    assert tensors["hidden"][2 * config.block_M :].isnan().all(), "a block without an expert ends at once"

    hidden, scale_hidden, exact = tensors["hidden"], scale_x, tensors["hidden"]
    if kind == "fp8":
        hidden, scale_hidden = torch.full(exact.shape, torch.nan).to(torch.float8_e4m3fn), torch.full((capacity,), torch.nan)
        changed = {"x": exact, "codes": hidden, "scale": scale_hidden, "positions": case.positions.flatten()}
        execute_one(rows, rows.quantize_sorted(I), (TOKENS * TOP_K, 1), **changed, sizes={"groups": I // 32})
        codes, scale = quantized(exact[used])
        assert torch.equal(hidden.view(torch.uint8)[used], codes.view(torch.uint8))
        assert torch.equal(scale_hidden[used], scale)
        exact = hidden.double() * scale_hidden[:, None].double()
    sizes = {"groups": H // 32, "I": I} if module is many else {"groups": I // 32, "hidden_groups": H // 32}
    down = module.down(config, "reduce", *([operand] if module is many else []))
    grid = (many.num_processors(), 1) if module is many else (-(-H // config.rows), 3)
    execute_one(module, down, grid, hidden=hidden, scale_hidden=scale_hidden, sizes=sizes)
    expected = case.expected(exact)
    written = ~expected.isnan()
    assert torch.equal(tensors["y"].isnan(), ~written)
    assert_close(tensors["y"][written], expected[written], dtype="bfloat16")


@needs_compiler
@pytest.mark.parametrize(
    ("module", "config", "kind", "sizes"),
    [
        (few, few.Config(16, 4, 2, 1), "bfloat16", (H, I)),
        (many, many.Config(16, 4, 2), "bfloat16", (H, I)),
        (many, many.Config(8, 1, 3), "fp8", LONG),
        (many, many.Config(32, 2, 3), "fp8", (H, I)),
        (many, many.Config(96, 1, 2), "fp8", (H, I)),  # the tokens of a tile are stored in two parts, 24 ready at a time
    ],
    ids=str,
)
def test_values(module, config, kind, sizes, monkeypatch):
    monkeypatch.setattr(many, "num_processors", lambda: 1)  # blocks take several tiles
    run(module, config, kind, *sizes)


@needs_compiler
def test_rows():
    """Rows of two steps of the threads, with what has no scale, quantised and not; what no slot has stays as it is."""
    H = 1056
    x = torch.randn(4, H) * torch.exp2(torch.arange(4) * 20.0 - 40)[:, None]
    x[1, 1030], x[2], x[3, 7] = torch.nan, 0, -torch.inf
    x = x.bfloat16()
    positions = torch.tensor([[2, -1, 5], [0, 1, -1], [-1, 4, -1], [7, -1, -1]], dtype=torch.int32)
    want, got = torch.full((8, H), 7.0).bfloat16(), torch.full((8, H), 7.0).bfloat16()
    codes, scale = torch.full((8, H), 7.0).to(torch.float8_e4m3fn), torch.full((8,), 7.0)
    want_codes, want_scale = codes.clone(), scale.clone()
    of_row = quantized(torch.where(x.isfinite(), x, 0))
    for token, slot in (positions >= 0).nonzero().tolist():
        row = positions[token, slot]
        want[row], want_codes[row], want_scale[row] = x[token], of_row[0][token], of_row[1][token]
    for row in (0, 1, 7):
        want_codes[row], want_scale[row] = torch.nan, torch.nan
    tensors = {"x": x, "positions": positions, "sorted_x": got, "codes": codes, "scale": scale}
    scalars = {"tokens": 4, "top_k": 3, "groups": H // 32, "rows": 8}
    execute(text_of(rows, rows.scatter()), (4, 2), tensors, {}, scalars)
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))
    execute(text_of(rows, rows.scatter_quantized(H)), (4, 1), tensors, {}, scalars)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))
    assert torch.equal(scale.nan_to_num(-1), want_scale.nan_to_num(-1))


def emulated(make, arguments, device, pass_configs=()):
    """In place of the launches' `compiled`: kernels for Hopper by their text, those of every target on target c."""
    if make is moe_sort:
        arguments = arguments[:3]  # a launch on the CPU ends before the next one
    prim_func = make(*arguments)
    if not pass_configs:
        return tilelang.compile(prim_func, target="c")
    config = next((argument for argument in arguments if hasattr(argument, "block_M")), None)
    text = text_of(types.SimpleNamespace(PASS_CONFIGS=dict(pass_configs)), prim_func)
    buffers, extents = [prim_func.buffer_map[parameter] for parameter in prim_func.params], {}

    def find_extents(node):
        if isinstance(node, tvm.tirx.For) and node.thread_binding is not None:
            extents[node.thread_binding.thread_tag] = node.extent

    tvm.tirx.stmt_functor.post_order_visit(prim_func.body, find_extents)

    def run(*tensors):
        sizes = {}
        for buffer, tensor in zip(buffers, tensors, strict=True):
            assert str(tensor.dtype).removeprefix("torch.") == buffer.dtype
            assert tensor.is_contiguous()
            for extent, size in zip(buffer.shape, tensor.shape, strict=True):
                var, factor = (extent.a, extent.b) if isinstance(extent, tvm.tirx.Mul) else (extent, 1)
                if isinstance(var, tvm.tirx.Var):
                    assert sizes.setdefault(var, size // int(factor)) * int(factor) == size, buffer.name
                else:
                    assert int(var) == size, buffer.name
        values = {var: tvm.tirx.IntImm("int32", size) for var, size in sizes.items()}
        grid = [
            int(tvm.arith.Analyzer().simplify(tvm.tirx.stmt_functor.substitute(extents[f"blockIdx.{axis}"], values)))
            for axis in "xy"
            if f"blockIdx.{axis}" in extents
        ]
        by_name = {buffer.name: tensor for buffer, tensor in zip(buffers, tensors, strict=True)}
        boxes = {
            name: Box(config.block_M, 128 // by_name[name].itemsize) for name in ("x", "hidden") if name in by_name and config
        }
        execute(text, (*grid, 1)[:2], by_name, boxes, {var.name: size for var, size in sizes.items()})

    return run


@needs_compiler
@pytest.mark.parametrize(
    ("module", "config", "kind", "epilogue"),
    [
        (few, few.Config(8, 8, 1, 1), "bfloat16", "atomic"),  # blocks of two tiles of rows, of which there are five
        (many, many.Config(8, 1, 2), "bfloat16", "atomic"),
        (many, many.Config(8, 1, 2), "fp8", "reduce"),
    ],
    ids=str,
)
def test_launch(module, config, kind, epilogue, monkeypatch):
    """From the router's tensors to y, an expert elsewhere, an id that no expert has. Hidden rows are bfloat16, then E4M3."""
    monkeypatch.setattr(launch, "pick", lambda *sizes: (module, config))
    monkeypatch.setattr(many, "num_processors", lambda: 3)
    case = Case(config.block_M)
    in_tiles = (tile_for_hopper(w, gate=gate, a_dtype=kind) for w, gate in ((case.w13, True), (case.w2, False)))
    topk_ids = torch.tensor([[3, 0], [1, 3], [2, 9], [0, 1], [3, 2]])
    topk_weights, mask = torch.rand(TOKENS, TOP_K), torch.tensor([True, False, True, True])
    tokens, y = (case.x, topk_ids, topk_weights), torch.full_like(case.x, torch.nan)
    launch_all(*tokens, *in_tiles, Activation(), kind, epilogue, mask, y, compiled=emulated)
    expected = torch.empty(y.shape, dtype=torch.float64)
    requantize = reference.requantize
    monkeypatch.setattr(reference, "requantize", lambda values, kind: requantize(values.bfloat16(), kind))
    monkeypatch.setattr(door.activations, "between", lambda kind: kind)
    door._by_reference(*tokens, case.w13, case.w2, Activation(), kind, epilogue, mask, expected)
    assert_close(y, expected, dtype="bfloat16", max_error=3e-2, rms_error=4e-3)


@pytest.mark.parametrize(
    ("kind", "config", "rows", "num_experts", "expected"),
    [
        ("fp8", (16, 4, 5), 7168, 64, (16, 4, 5)),  # 7 rounds of 512 rows, 14 of 256
        ("fp8", (16, 4, 5), 2880, 32, (16, 2, 11)),  # 2 rounds of 512 rows, the second half empty; 3 of 256
        ("bfloat16", (24, 4, 9), 2880, 32, (24, 2, 17)),
        ("fp8", (256, 1, 4), 2880, 32, (256, 1, 4)),  # has no other
    ],
)
def test_fitting(kind, config, rows, num_experts, expected, monkeypatch):
    monkeypatch.setattr(many, "num_processors", lambda: 132)
    assert launch.fitting(many.Config(*config), kind, rows, num_experts) == many.Config(*expected)


@needs_nvcc
def test_instructions():
    """Products of a warp and of a warpgroup, decoded with one multiplication a pair; nothing spilled but a word or two."""
    table, table_e4m3 = launch._TABLES["bfloat16"], launch._TABLES["fp8"]
    cases = {"few": (*table[1][2:], "HMMA"), "many": (*table[-1][2:], "HGMMA")}
    cases |= {"e4m3_few": (*table_e4m3[0][2:], "QGMMA"), "e4m3_many": (*table_e4m3[-1][2:], "QGMMA")}
    texts = {}
    for name, (module, config, _) in cases.items():
        operand = [OPERANDS["fp8"]] if "e4m3" in name else []
        texts[f"{name}_gate_up"] = text_of(module, module.gate_up(config, Activation(), *operand), f"{name}_gate_up")
        texts[f"{name}_down"] = text_of(module, module.down(config, "reduce", *operand), f"{name}_down")
    for name, program in compile_texts(texts, ARCH).items():
        assert program.spilled <= 32, name
        assert program.count(cases[name.partition("_gate")[0].partition("_down")[0]][2]) > 0, name
        assert program.count("PRMT" if "e4m3" in name else "HMUL2") > 0, name


def test_what_is_refused():
    weights = Case(8).w13
    loud = weights._replace(scale=torch.full_like(weights.scale, 129))
    with pytest.raises(ValueError, match=r"tile_for_hopper: E8M0 scales beside bfloat16 must be at most 128, 2\^1; got 129"):
        tile_for_hopper(loud, gate=True)
    wide = weights._replace(codes=weights.codes.clone(), scale=weights.scale.clone())
    wide.codes[1, 3, :32] = 0x71  # 0.5 and 6 in each group that counts
    wide.scale[1, 3, :3] = torch.tensor([111, 122, 115])
    tile_for_hopper(wide, gate=True, a_dtype="fp8")
    wide.scale[1, 3, 0] = 110
    with pytest.raises(
        ValueError, match=r"scales of a row must lie within 2\^11 of each other to be exact in E4M3; got 110 to"
    ):
        tile_for_hopper(wide, gate=True, a_dtype="fp8")
    with pytest.raises(ValueError, match="a_dtype must be 'bfloat16' or 'fp8'; got 'mxfp4'"):
        tile_for_hopper(weights, gate=True, a_dtype="mxfp4")
    case = Case(8)
    w13, w2 = tile_for_hopper(case.w13, gate=True), tile_for_hopper(case.w2, gate=False)
    ids, topk_weights = torch.zeros(TOKENS, 1, dtype=torch.int32), torch.ones(TOKENS, 1)
    with pytest.raises(ValueError, match="w13 and w2 must both be of tile_for_hopper or neither"):
        mxfp4_moe(case.x, ids, topk_weights, w13, case.w2, activation=Activation())
    with pytest.raises(NotImplementedError, match=r"bfloat16 x and its own a_dtype, here bfloat16; got x torch\.float16"):
        mxfp4_moe(case.x.half(), ids, topk_weights, w13, w2, activation=Activation())
    mixed = tile_for_hopper(case.w13, gate=True, a_dtype="fp8"), w2
    for a_dtype in (None, "fp8"):
        with pytest.raises(NotImplementedError, match="its own a_dtype, here bfloat16 and fp8; got x"):
            mxfp4_moe(case.x, ids, topk_weights, *mixed, activation=Activation(), a_dtype=a_dtype)
    with pytest.raises(NotImplementedError, match=r"are for NVIDIA GPUs of compute capability 9\.0"):
        mxfp4_moe(case.x, ids, topk_weights, w13, w2, activation=Activation())
