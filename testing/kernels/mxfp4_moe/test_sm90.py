"""The mixture of experts on Hopper: values by running the CUDA text on the CPU, the machine code, what is refused."""

import functools

import pytest
import torch
from cuda.execute import needs_compiler
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.hopper import Box, execute
from kernels.mxfp4_moe.operands import SWIGLU, launch_kernels, problem
from kernels.mxfp4_moe.sm90_cases import ARCH, quantized, text_of
from kernels.mxfp4_moe.targets import compiled
from numeric import assert_close
from tilelang import tvm

from tilelang_ext import reference
from tilelang_ext.formats import E2M1, BlockScaledLayout
from tilelang_ext.kernels.mxfp4_moe import launch as moe_launch
from tilelang_ext.kernels.mxfp4_moe import operator as moe_operator
from tilelang_ext.kernels.mxfp4_moe import sm90_config, sm90_mma, sm90_scatter, sm90_wgmma
from tilelang_ext.kernels.mxfp4_moe.arguments import Operands
from tilelang_ext.kernels.mxfp4_moe.launch import problem_of
from tilelang_ext.kernels.mxfp4_moe.operator import mxfp4_moe
from tilelang_ext.kernels.mxfp4_moe.problem import HOPPER_LAYOUTS
from tilelang_ext.kernels.mxfp4_moe.routing import moe_sort
from tilelang_ext.kernels.mxfp4_moe.sm90_tiles import TILE, TILE_FORMATS
from tilelang_ext.kernels.mxfp4_moe.weights import MXFP4Weights, prepare_mxfp4_weights, tile_for_hopper

EXPERTS, TOKENS, TOP_K = 3, 5, 2
H, I = 96, 160  # K of one step and a half, and of two and a half; rows that fill no tile
LONG = (288, 416)  # the same in steps of E4M3, more steps than the pipeline has stages
NUM_BLOCKS = 3  # of a persistent kernel here, each of which takes several tiles


class Case:
    """Random weights, padded with poison, and a routing with one block for each of two experts; the third has no token."""

    def __init__(self, block_M, H=H, I=I):
        self.H, self.I = H, I
        generator = torch.Generator().manual_seed(0)

        def weights(rows, k, padding, gate):
            codes = torch.randint(0, 256, (EXPERTS, rows + padding, k // 2 + 16), generator=generator, dtype=torch.uint8)
            scale = torch.randint(118, 129, (EXPERTS, rows + padding, k // 32 + 1), generator=generator, dtype=torch.uint8)
            size = 1 if gate else 300  # as large as the result of the GEMM
            bias = torch.randn(EXPERTS, rows + padding, generator=generator) * size
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
        """The hidden rows that have a token, float64, given x (tokens, H)."""
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
        """The result (tokens, top_k, H) given the hidden rows, NaN where no row has the slot."""
        matrix = dequantized(self.w2)[:, : self.H, : self.I]
        y = torch.full((TOKENS, TOP_K, self.H), torch.nan, dtype=torch.float64)
        for row, (token, slot) in self.rows.items():
            expert = self.expert_ids[row // self.block_M]
            result = matrix[expert] @ hidden[row].double() + self.w2.bias[expert, : self.H].double()
            y[token, slot] = result * self.weights[row].double()
        return y


def dequantized(weights):
    return reference.dequantize(weights.codes, weights.scale, E2M1, BlockScaledLayout.e8m0_k32())


def prim_funcs(module, config, a_format, epilogue, num_blocks=NUM_BLOCKS):
    """The prim_funcs of both GEMMs."""
    if module is sm90_mma:
        return module.gate_up(config, SWIGLU), module.down(config, epilogue)
    tile_format = TILE_FORMATS[a_format]
    return module.gate_up(config, num_blocks, SWIGLU, tile_format), module.down(config, num_blocks, epilogue, tile_format)


def run(module, config, a_format, H, I):
    """What runs before, between and after the GEMMs, and both of them, each against float64 of what it was given."""
    case = Case(config.block_M, H, I)
    w13, w2 = (tile_for_hopper(w, a_dtype=a_format) for w in (case.w13, case.w2))
    tile_format, capacity = TILE_FORMATS[a_format], len(case.token_ids)
    tensors = {
        "token_ids": case.token_ids, "weights": case.weights, "expert_ids": case.expert_ids, "num_valid": case.num_valid,
        "positions": case.positions, "x": case.x,
        "w13": w13.tiles, "scale13": w13.row_scale, "bias13": w13.bias,
        "w2": w2.tiles, "scale2": w2.row_scale, "bias2": w2.bias,
        "hidden": torch.full((capacity, I), torch.nan).bfloat16(),
        "y": torch.full((TOKENS, TOP_K, H), torch.nan).bfloat16(),
    }  # fmt: skip
    box_M = config.box_M if module is sm90_wgmma else config.block_M
    boxes = {name: Box(box_M, tile_format.K) for name in ("x", "hidden")}

    def execute_one(pass_configs, prim_func, grid, sizes, **changed):
        scalars = {
            "tokens": TOKENS, "top_k": TOP_K, "blocks": 3, "rows": capacity, "slots": TOKENS * TOP_K, "experts": EXPERTS,
        }  # fmt: skip
        given = tensors | changed
        weights = given["w13"] if prim_func.attrs["global_symbol"] == "gate_up" else given["w2"]
        scalars |= {"lines": weights.numel() // 4, "row_tiles": weights.shape[1], "steps": weights.shape[2]}
        scalars |= {"scaled_rows": weights.shape[1] * TILE, **sizes}
        execute(text_of(prim_func, pass_configs), grid, given, boxes, scalars)

    x, scale_x, sorted_x = case.x, torch.empty(0), torch.full((capacity, H), torch.nan).bfloat16()
    if a_format == "fp8":
        codes, scale = quantized(case.x)
        x = codes.double() * scale[:, None].double()
        sorted_x, scale_x = sorted_x.to(codes.dtype), torch.full((capacity,), torch.nan)
        prim_func, sizes = sm90_scatter.scatter_quantized(H), {"groups": H // 32}
        execute_one(sm90_scatter.PASS_CONFIGS, prim_func, (TOKENS, 1), sizes, codes=sorted_x, scale=scale_x)
        used = torch.full((capacity,), -1)
        used[list(case.rows)] = torch.tensor([token for token, _ in case.rows.values()])
        assert torch.equal(sorted_x.view(torch.uint8)[used >= 0], codes.view(torch.uint8)[used[used >= 0]])
        assert torch.equal(scale_x[used >= 0], scale[used[used >= 0]])
        assert scale_x[used < 0].isnan().all()
    elif module is sm90_wgmma:
        prim_func, sizes = sm90_scatter.scatter(), {"groups": H // 32}
        execute_one(sm90_scatter.PASS_CONFIGS, prim_func, (TOKENS, 1), sizes, sorted_x=sorted_x)
    if module is sm90_mma:
        sorted_x = case.x
    gate_up, down = prim_funcs(module, config, a_format, "reduce")
    sizes = {"groups": I // 32, "hidden_groups": H // 32, "H": H}
    grid = (NUM_BLOCKS, 1) if module is sm90_wgmma else (-(-2 * I // config.rows), 3)
    execute_one(module.PASS_CONFIGS, gate_up, grid, sizes, x=sorted_x, scale_x=scale_x)
    used = list(case.rows)
    assert_close(tensors["hidden"][used], case.expected_hidden(x), dtype="bfloat16")
    assert tensors["hidden"][2 * config.block_M :].isnan().all(), "a block without an expert ends at once"

    hidden, scale_hidden, exact = tensors["hidden"], scale_x, tensors["hidden"]
    if a_format == "fp8":
        hidden, scale_hidden = torch.full(exact.shape, torch.nan).to(torch.float8_e4m3fn), torch.full((capacity,), torch.nan)
        changed = {"x": exact, "codes": hidden, "scale": scale_hidden, "positions": case.positions.flatten()}
        prim_func, sizes = sm90_scatter.quantize_sorted(I), {"groups": I // 32}
        execute_one(sm90_scatter.PASS_CONFIGS, prim_func, (TOKENS * TOP_K, 1), sizes, **changed)
        codes, scale = quantized(exact[used])
        assert torch.equal(hidden.view(torch.uint8)[used], codes.view(torch.uint8))
        assert torch.equal(scale_hidden[used], scale)
        exact = hidden.double() * scale_hidden[:, None].double()
    sizes = {"groups": H // 32, "I": I} if module is sm90_wgmma else {"groups": I // 32, "hidden_groups": H // 32}
    grid = (NUM_BLOCKS, 1) if module is sm90_wgmma else (-(-H // config.rows), 3)
    execute_one(module.PASS_CONFIGS, down, grid, sizes, hidden=hidden, scale_hidden=scale_hidden)
    expected = case.expected(exact)
    written = ~expected.isnan()
    assert torch.equal(tensors["y"].isnan(), ~written)
    assert_close(tensors["y"][written], expected[written], dtype="bfloat16")


@needs_compiler
@pytest.mark.parametrize(
    ("module", "config", "a_format", "sizes"),
    [
        (sm90_mma, sm90_mma.Config(16, 4, 2, 1), "bfloat16", (H, I)),
        (
            sm90_wgmma,
            sm90_wgmma.Config(32, 4, 2, (16,)),
            "bfloat16",
            (H, I),
        ),  # two groups of tiles; the second block is narrower
        (sm90_wgmma, sm90_wgmma.Config(8, 1, 3), "fp8", LONG),
        # Config(32, 2, 3): test_launch
        # Two subtiles of tokens per tile, 24 tokens ready at a time; the second block has one, in boxes of 24.
        (sm90_wgmma, sm90_wgmma.Config(96, 1, 2, (24,)), "fp8", (H, I)),
    ],
    ids=str,
)
def test_values(module, config, a_format, sizes):
    run(module, config, a_format, *sizes)


@needs_compiler
def test_rows():
    """Rows longer than the threads load at a time, quantised and not, some without a finite scale; padding stays as it is."""
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
    execute(text_of(sm90_scatter.scatter(), sm90_scatter.PASS_CONFIGS), (4, 2), tensors, {}, scalars)
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))
    execute(text_of(sm90_scatter.scatter_quantized(H), sm90_scatter.PASS_CONFIGS), (4, 1), tensors, {}, scalars)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))
    assert torch.equal(scale.nan_to_num(-1), want_scale.nan_to_num(-1))


def emulated(make, arguments, device, pass_configs=()):
    """In place of `launch.compiled`: kernels for Hopper run from their text, those for every target on target c."""
    if make is moe_sort:
        arguments = arguments[:3]  # without PDL: a kernel on the CPU ends before the next one
    if not pass_configs:
        return compiled(make, arguments, "c")
    prim_func = make(*arguments)
    config = next((argument for argument in arguments if hasattr(argument, "block_M")), None)
    text = text_of(prim_func, dict(pass_configs))
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
    ("module", "config", "a_format", "epilogue"),
    [
        (sm90_mma, sm90_mma.Config(8, 8, 1, 1), "bfloat16", "atomic"),  # blocks of two tiles of rows, of which there are five
        (sm90_wgmma, sm90_wgmma.Config(16, 4, 2), "bfloat16", "atomic"),
        (sm90_wgmma, sm90_wgmma.Config(32, 2, 3), "fp8", "reduce"),
    ],
    ids=str,
)
def test_launch(module, config, a_format, epilogue, monkeypatch):
    """From the router's tensors to y, with an expert on another rank and an id out of range."""
    monkeypatch.setattr(moe_launch, "IMPLEMENTATIONS", (module,))
    monkeypatch.setattr(module, "pick_config", lambda problem: config)
    monkeypatch.setattr(module, "pick_configs", lambda problem: (config, config) if module is sm90_wgmma else (config,))
    case = Case(config.block_M)
    tiled = (tile_for_hopper(w, a_dtype=a_format) for w in (case.w13, case.w2))
    topk_ids = torch.tensor([[3, 0], [1, 3], [2, 9], [0, 1], [3, 2]])
    topk_weights, mask = torch.rand(TOKENS, TOP_K), torch.tensor([True, False, True, True])
    tokens, y = (case.x, topk_ids, topk_weights), torch.full_like(case.x, torch.nan)
    of_this_test = functools.partial(emulated)  # as what is launched for a problem is kept with it
    launch_kernels((*tokens, *tiled), y, SWIGLU, a_format, epilogue, mask, of_this_test, num_sms=NUM_BLOCKS)
    expected = torch.empty(y.shape, dtype=torch.float64)
    # The kernels round hidden rows to bfloat16, and then quantise whole rows to E4M3.
    requantize = reference.requantize
    monkeypatch.setattr(reference, "requantize", lambda values, a_format: requantize(values.bfloat16(), a_format))
    monkeypatch.setattr(moe_operator, "hidden_format", lambda a_format: a_format)
    operands = Operands(*tokens, case.w13, case.w2, mask)
    moe_operator._by_reference(problem_of(operands, SWIGLU, a_format, epilogue), operands, expected)
    assert_close(y, expected, dtype="bfloat16", max_error=3e-2, rms_error=4e-3)


@pytest.mark.parametrize(
    ("a_format", "config", "rows", "num_experts", "expected"),
    [
        ("fp8", (16, 4, 5), 7168, 64, (16, 4, 5)),  # 7 waves of 512 rows, 14 of 256
        ("fp8", (16, 4, 5), 2880, 32, (16, 2, 11)),  # 2 waves of 512 rows, the second half empty; 3 of 256
        ("bfloat16", (24, 4, 9), 2880, 32, (24, 2, 17)),
        ("fp8", (256, 1, 4, (128,)), 2880, 32, (256, 1, 4, (128,))),  # has no other
    ],
)
def test_fitted(a_format, config, rows, num_experts, expected):
    case = problem(640, 4, num_experts, a_format=a_format)
    assert sm90_config.fitted(sm90_wgmma.Config(*config), case, rows) == sm90_wgmma.Config(*expected)


@pytest.mark.parametrize("a_format", TILE_FORMATS)
def test_tiles_fit_in_shared_memory(a_format):
    """Stages, a subtile of each consumer, two buffers of what the epilogue reads, and 2 KB of barriers and alignment."""
    few, many = sm90_config._FEW_TOKENS[a_format], sm90_config._MANY_TOKENS[a_format]
    for config in (*(config for _, configs in few for config in configs), *many):
        stage = config.block_M * 128 + config.block_tiles * TILE_FORMATS[a_format].tile_words * 4
        subtiles, vectors = 2 * config.subtile_M * (TILE + 8) * 2, 2 * 4 * (2 * config.rows + 3 * config.block_M)
        assert config.num_stages * stage + subtiles + vectors + 2048 <= 227 * 1024, config
        assert config.consumer_tiles % config.group_tiles == 0, config
        assert all(width % 8 == 0 for width in config.widths), config


def test_few_experts_have_narrow_tiles():
    """7 slots are 7 experts at most: 147 tiles of 256 rows are two waves, 294 of 128 three; 56 leave SMs without work."""
    case = problem(1, 7, 585, a_format="fp8")
    assert [sm90_config.fitted(sm90_wgmma.Config(8, 2, 11), case, rows).rows for rows in (1920, 5280)] == [128, 128]
    assert sm90_config.fitted(sm90_wgmma.Config(8, 2, 11), problem(640, 7, 585, a_format="fp8"), 1920).rows == 256


@pytest.mark.parametrize(
    ("module", "a_format", "tokens", "expected"),
    [
        (sm90_mma, "bfloat16", 16, (8, 4, 2, 4)),  # 64 slots
        (sm90_mma, "bfloat16", 17, (8, 8, 1, 4)),
        (sm90_wgmma, "bfloat16", 96, (16, 4, 10)),  # 12 rows per expert
        (sm90_wgmma, "bfloat16", 97, (24, 4, 9)),
        (sm90_wgmma, "bfloat16", 176, (32, 4, 9)),  # 22 rows per expert
        (sm90_wgmma, "bfloat16", 1360, (192, 1, 7)),
        (sm90_wgmma, "bfloat16", 8192, (256, 1, 5)),  # 1024 +- 32 rows
        (sm90_wgmma, "fp8", 48, (8, 2, 11)),
        (sm90_wgmma, "fp8", 1360, (192, 1, 6)),  # 170 +- 13
        (sm90_wgmma, "fp8", 1536, (256, 1, 4, (192,))),  # 192 +- 14: one tile, of which half have 192 tokens
        (sm90_wgmma, "fp8", 800, (144, 1, 7)),  # 100 +- 10
        (sm90_wgmma, "fp8", 2048, (144, 1, 7)),  # 256 +- 16: two tiles
    ],
)
def test_pick_config(module, a_format, tokens, expected):
    case = problem(tokens, 4, 32, a_format=a_format, weights_layout=HOPPER_LAYOUTS[a_format])
    assert module.pick_config(case) == module.Config(*expected)


@needs_nvcc
def test_instructions():
    """MMAs of a warp and of a warpgroup, decoding by one multiplication per pair; nothing is spilled but a word or two."""
    cases = {
        "mma": (sm90_mma, sm90_mma.Config(8, 8, 1, 4), "bfloat16", "HMMA"),
        "wgmma": (sm90_wgmma, sm90_wgmma.Config(256, 1, 5), "bfloat16", "HGMMA"),
        "e4m3_small": (sm90_wgmma, sm90_wgmma.Config(8, 2, 11), "fp8", "QGMMA"),
        "e4m3_large": (sm90_wgmma, sm90_wgmma.Config(256, 1, 4, (192,)), "fp8", "QGMMA"),
    }
    texts = {}
    for name, (module, config, a_format, _) in cases.items():
        for stage, prim_func in zip(("gate_up", "down"), prim_funcs(module, config, a_format, "reduce", 132), strict=True):
            texts[f"{name}_{stage}"] = text_of(prim_func, module.PASS_CONFIGS, f"{name}_{stage}")
    for name, program in compile_texts(texts, ARCH).items():
        assert program.spilled <= 32, name
        assert program.count(cases[name.removesuffix("_gate_up").removesuffix("_down")][3]) > 0, name
        assert program.count("PRMT" if "e4m3" in name else "HMUL2") > 0, name


def test_what_is_refused():
    weights = Case(8).w13
    loud = weights._replace(scale=torch.full_like(weights.scale, 129))
    with pytest.raises(ValueError, match=r"tile_for_hopper: E8M0 scales for bfloat16 must be at most 128, 2\^1; got 129"):
        tile_for_hopper(loud)
    wide = weights._replace(codes=weights.codes.clone(), scale=weights.scale.clone())
    wide.codes[1, 3, :32] = 0x71  # 0.5 and 6 in each group that counts
    wide.scale[1, 3, :3] = torch.tensor([111, 122, 115])
    tile_for_hopper(wide, a_dtype="fp8")
    wide.scale[1, 3, 0] = 110
    with pytest.raises(
        ValueError, match=r"scales of a row must lie within 2\^11 of each other to be exact in E4M3; got 110 to"
    ):
        tile_for_hopper(wide, a_dtype="fp8")
    with pytest.raises(ValueError, match="a_dtype must be 'bfloat16' or 'fp8'; got 'mxfp4'"):
        tile_for_hopper(weights, a_dtype="mxfp4")
    case = Case(8)
    w13, w2 = tile_for_hopper(case.w13), tile_for_hopper(case.w2)
    ids, topk_weights = torch.zeros(TOKENS, 1, dtype=torch.int32), torch.ones(TOKENS, 1)
    options = {"activation": SWIGLU}
    mixed = tile_for_hopper(case.w13, a_dtype="fp8"), w2
    for pair, layouts in (((w13, case.w2), "hopper_bfloat16 and general"), (mixed, "hopper_fp8 and hopper_bfloat16")):
        with pytest.raises(
            ValueError, match=f"must both be returned by tile_for_hopper for one a_dtype.*got layouts {layouts};"
        ):
            mxfp4_moe(case.x, ids, topk_weights, *pair, **options)
    with pytest.raises(NotImplementedError, match=r"tiled for, here bfloat16; got x torch\.float16, a_dtype float16"):
        mxfp4_moe(case.x.half(), ids, topk_weights, w13, w2, **options)
    with pytest.raises(NotImplementedError, match=r"tiled for, here bfloat16; got x torch\.bfloat16, a_dtype fp8"):
        mxfp4_moe(case.x, ids, topk_weights, w13, w2, **options, a_dtype="fp8")
    with pytest.raises(NotImplementedError, match=r"must be used on an NVIDIA GPU of compute capability 9\.0"):
        mxfp4_moe(case.x, ids, topk_weights, w13, w2, **options)


@pytest.mark.parametrize(("a_format", "K", "words"), [("bfloat16", 64, 544), ("fp8", 128, 1088)])
def test_hopper_weights_are_as_documented(a_format, K, words):
    """Of w13 eight gate rows and eight up rows of the same features in turn, of w2 even rows before odd; rows fill tiles."""
    case = Case(8)
    w13, w2 = (tile_for_hopper(w, a_dtype=a_format) for w in (case.w13, case.w2))
    assert (w13.layout, w13.num_experts, w13.rows, w13.k) == (HOPPER_LAYOUTS[a_format], EXPERTS, 2 * I, H)
    for tiled, rows, k in ((w13, 2 * I, H), (w2, H, I)):
        row_tiles = -(-rows // 64)
        assert (tiled.tiles.shape, tiled.tiles.dtype) == ((EXPERTS, row_tiles, -(-k // K), words), torch.uint32)
        assert tiled.bias.shape == (EXPERTS, row_tiles * 64)
        assert tiled.row_scale.shape == (tiled.bias.shape if a_format == "fp8" else (0, 0))
        assert not tiled.bias[:, rows:].any()
    half = case.w13.codes.shape[1] // 2
    assert torch.equal(w13.bias[:, 16:24], case.w13.bias[:, 8:16])
    assert torch.equal(w13.bias[:, 24:32], case.w13.bias[:, half + 8 : half + 16])
    assert torch.equal(w2.bias[:, 16:32], torch.cat([case.w2.bias[:, 16:32:2], case.w2.bias[:, 17:32:2]], 1))
    assert MXFP4Weights(*case.w13).layout == "general"
