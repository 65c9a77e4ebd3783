"""`attention_decode`: its kernels in the simulator and as CUDA text on the CPU, against float64."""

import functools
from dataclasses import replace

import pytest
import torch
from cuda.execute import needs_compiler
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.attention.operands import BF16, FP16, FUNCTIONS, check, name, text_of
from kernels.hopper import GIVING, Box, execute

from tilelang_ext import attention_decode, reference, simulate
from tilelang_ext.kernels.attention import (
    decode_launch,
    sm90_decode,
    sm90_decode_mma,
    sm90_decode_mma_block,
    sm90_sum,
    split_kv,
)
from tilelang_ext.kernels.attention.problem import DecodeProblem
from tilelang_ext.kernels.attention.sm90_block import ARCH
from tilelang_ext.launch.expression import apply

E4M3 = torch.float8_e4m3fn


def problem(D, arch="", dtype=BF16, cache=None, **options):
    kind = {"sm": "cuda", "gf": "hip", "": "metal"}[arch[:2]]
    return DecodeProblem(kind, arch, 8, D, name(dtype), name(cache or dtype), D**-0.5, **options)


class Case:
    """A call: two sequences with their keys in pages in a random order, or not; what no sequence has is NaN."""

    def __init__(self, of: DecodeProblem, lengths, tokens, heads, kv_heads, seed=0):
        generator = torch.Generator().manual_seed(seed)
        dtype, cache_dtype, D = getattr(torch, of.dtype), getattr(torch, of.cache_dtype), of.head_dim
        batch, longest = len(lengths), max(lengths) + 3
        size = of.page_size or longest
        per_sequence = -(-longest // size)
        pages = batch * per_sequence + (1 if of.page_size else 0)
        self.page_table = torch.randperm(pages, generator=generator, dtype=torch.int64)[: batch * per_sequence]
        self.page_table = (
            self.page_table.view(batch, per_sequence).int() if of.page_size else torch.zeros(1, 1, dtype=torch.int32)
        )
        self.seqlens = torch.tensor(lengths, dtype=torch.int32)
        self.q = torch.randn(batch, tokens, heads, D, generator=generator).to(dtype)
        self.sinks = torch.randn(heads, generator=generator)
        shape = {"": (1,), "head": (kv_heads,), "page": (pages, kv_heads)}[of.scales]
        self.k_scale, self.v_scale = (torch.exp2(torch.randn(shape, generator=generator)) for _ in range(2))
        caches = []
        for _ in range(2):
            rows = torch.randn(pages, size, kv_heads, D, generator=generator).to(cache_dtype)
            inside = torch.zeros(pages, size, dtype=torch.bool)
            for b, length in enumerate(lengths):
                for key in range(length):
                    inside[self.page_table[b, key // size] if of.page_size else b, key % size] = True
            codes = rows.view(torch.uint8) if of.is_fp8 else rows
            codes[~inside] = 0x7F if of.is_fp8 else torch.nan
            caches.append(rows)
        self.cache_k, self.cache_v = caches
        self.out = torch.full_like(self.q, torch.nan)
        self.lse = torch.full((batch, heads, tokens), torch.nan)

    def expected(self, of: DecodeProblem):
        outs, lses = [], []
        for b, length in enumerate(self.seqlens.tolist()):
            keys = torch.arange(length)
            page = self.page_table[b, keys // of.page_size].long() if of.page_size else torch.full_like(keys, b)
            row = keys % of.page_size if of.page_size else keys
            k, v = self.cache_k[page, row].double(), self.cache_v[page, row].double()
            if of.scales:
                k_scale, v_scale = (
                    (x[page] if of.scales == "page" else x)[..., None].double() for x in (self.k_scale, self.v_scale)
                )
                k, v = k * k_scale, v * v_scale
            sinks = self.sinks if of.has_sinks else None
            o, lse = reference.attention(self.q[b : b + 1], k[None], v[None], of.scale, True, of.window or None, sinks)
            outs.append(o), lses.append(lse)
        return torch.cat(outs), torch.cat(lses)

    @property
    def inputs(self) -> tuple:
        return self.q, self.cache_k, self.cache_v, self.seqlens, self.page_table, self.k_scale, self.v_scale


@pytest.mark.parametrize(
    ("of", "target", "lengths", "sizes", "splits"),
    [
        # A range without keys; several pages in a block of keys, each with its scales
        (problem(72, cache=E4M3, page_size=16, scales="page", has_sinks=True), "metal", (40, 3), (2, 4, 2), 3),
        # Pages that end inside a block of keys; a window
        (problem(64, "gfx942", FP16, page_size=24, window=33), "hip", (70, 30), (8, 2, 1), 1),
    ],
)
def test_values(of, target, lengths, sizes, splits):
    case = Case(of, lengths, *sizes)
    partial = torch.full((splits, *case.q.shape), torch.nan)
    partial_lse = torch.full((splits, *case.lse.shape), torch.nan)
    target = {"kind": "hip", "mcpu": of.arch} if target == "hip" else target
    config = split_kv.pick_config(of)
    for kernel, given in (
        (split_kv.split_kv(of, config), (*case.inputs, partial, partial_lse)),
        (split_kv.sum_ranges(of.of_sum()), (partial, partial_lse, case.sinks, case.out, case.lse)),
    ):
        report = simulate(kernel, *given, target=target)
        assert not report.findings, str(report)
    check(case.out, case.lse, *case.expected(of))


FEW_ROWS = problem(128, ARCH, page_size=16, has_sinks=True, has_few_rows=True)


@functools.cache
def hopper_text(of):
    file = next(file for file in decode_launch.KERNELS if file.takes(of))
    name = "attention_decode" if file.sums_ranges(of) else "split_kv"
    return text_of(file.split_kv, of, file.pick_config(of), name=name, pass_configs=file.pass_configs(of))


@needs_compiler
@pytest.mark.parametrize(
    ("of", "lengths", "sizes", "splits"),
    [
        # Codes of 8 bits, of one scale per head, and per page of halves of the columns; blocks that end inside
        (problem(64, ARCH, cache=E4M3, scales="head"), (300, 70), (2, 2, 1), 2),
        (problem(272, ARCH, cache=E4M3, page_size=64, scales="page"), (100, 70), (1, 2, 1), 2),
        # The same, few rows: by the MMA of a warp; pages of half a block, a window; head_dim that ends inside
        (problem(64, ARCH, cache=E4M3, scales="head", has_few_rows=True), (600, 70), (1, 8, 1), 2),
        (problem(144, ARCH, cache=E4M3, page_size=16, window=40, has_few_rows=True), (100, 70), (3, 4, 2), 2),
        # Several pages in a block of keys; an odd number of blocks; a sequence without keys
        (problem(128, ARCH, page_size=16, has_sinks=True), (200, 0), (3, 8, 2), 2),
        # Few rows, whose ranges the kernel adds: more ranges than it loads together; rows of several tokens, sinks
        (FEW_ROWS, (1300, 0), (2, 6, 2), 19),
        (problem(72, ARCH, window=40, has_few_rows=True, has_many=True), (300, 70), (1, 5, 1), 2),
        # One range each, which its block stores: one consumer, the MMA of a warp, consumers of halves of the columns
        (problem(72, ARCH, has_sinks=True, has_few_rows=True, has_many=True), (300, 0), (2, 6, 2), 1),
        (problem(64, ARCH, cache=E4M3, has_sinks=True, scales="head", has_few_rows=True), (200, 0), (1, 5, 1), 1),
        (problem(296, ARCH, has_few_rows=True), (100, 70), (1, 2, 1), 1),
        # Wider heads: consumers of halves of the columns; no pages; a window; head_dim ends inside a half
        (problem(296, ARCH, window=40, has_few_rows=True), (100, 70), (1, 2, 1), 2),
    ],
)
def test_on_hopper(of, lengths, sizes, splits):
    """Values by running the CUDA text on the CPU; every other byte of memory is a NaN."""
    file = next(file for file in decode_launch.KERNELS if file.takes(of))
    case, config = Case(of, lengths, *sizes), file.pick_config(of)
    assert file is (sm90_decode_mma if of.is_fp8 and of.has_few_rows else sm90_decode)
    results = sm90_sum.places(splits, config.ranges) if file.sums_ranges(of) else splits * config.ranges
    names = ("q", "cache_k", "cache_v", "seqlens", "page_table", "k_scale", "v_scale")
    tensors = dict(zip(names, case.inputs, strict=True)) | {"sinks": case.sinks, "out": case.out, "lse": case.lse}
    tensors["partial"] = torch.full((results, *case.q.shape), torch.nan)
    tensors["partial_lse"] = torch.full((results, *case.lse.shape), torch.nan)
    tensors["given"] = torch.full((len(case.q), case.cache_k.shape[2], splits, config.parts + 1), -1)
    (batch, tokens, heads, _), (pages, keys, kv_heads, _) = case.q.shape, case.cache_k.shape
    scalars = {
        "batch": batch, "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "pages": pages, "keys": keys,
        "results": results, "splits": splits, "words": config.parts + 1, "num_seqlens": batch, "num_sinks": heads,
        "table_pages": case.page_table.shape[1], "table_rows": len(case.page_table),
    }  # fmt: skip
    columns = sm90_decode_mma_block.panel_width(of) if file is sm90_decode_mma else 64
    box = Box(min(config.block_N, of.page_size or config.block_N), columns, file is sm90_decode_mma or not of.is_fp8)
    execute(
        hopper_text(of),
        (splits, kv_heads, batch),
        tensors,
        {"cache_k": box, "cache_v": box},
        scalars,
        functions=FUNCTIONS + GIVING,
    )
    if file.sums_ranges(of):
        # What a block has waited for is cleared; nothing else is written
        assert set(tensors["given"].flatten().tolist()) <= {0, -1}
    else:
        text = text_of(split_kv.sum_ranges, of.of_sum(), name="sum_ranges", pass_configs=split_kv.pass_configs(of))
        execute(text, (tokens * heads, batch), tensors, {}, scalars, functions=FUNCTIONS)
    check(case.out, case.lse, *case.expected(of))


@needs_nvcc
def test_machine_code():
    """Nothing spills: the code that adds ranges must stand where consumers have their registers."""
    assert compile_texts({"attention_decode": hopper_text(FEW_ROWS)}, ARCH)["attention_decode"].spilled == 0


@pytest.mark.parametrize(
    ("of", "lengths", "sizes"),
    [
        (problem(24, has_sinks=True), (7, 3), (2, 4, 2)),
        (problem(24, dtype=FP16, page_size=3, window=2), (7, 0), (3, 2, 2)),
        (problem(24, cache=E4M3, page_size=4, scales="page"), (9, 2), (1, 4, 1)),
        (problem(24, cache=E4M3, scales="head"), (9, 2), (1, 4, 2)),
    ],
)
def test_operator(of, lengths, sizes):
    """On the CPU; queries ahead of the first key, and sequences without keys."""
    case = Case(of, lengths, *sizes)
    options = {"window": of.window or None, "sinks": case.sinks if of.has_sinks else None}
    options |= {"page_table": case.page_table} if of.page_size else {}
    options |= {"k_scale": case.k_scale, "v_scale": case.v_scale} if of.scales else {}
    o, lse = attention_decode(case.q, case.cache_k, case.cache_v, case.seqlens, out=case.out, **options)
    assert o is case.out
    check(o, lse, *case.expected(of))


Q, CACHE, LENGTHS = torch.zeros(2, 1, 4, 16, dtype=BF16), torch.zeros(2, 5, 2, 16, dtype=BF16), torch.ones(2, dtype=torch.int32)
TABLE, SCALE = torch.zeros(2, 3, dtype=torch.int32), torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Q[0], CACHE, CACHE, LENGTHS), {}, ValueError, r"q must have dimensions \(batch, tokens, heads, head_dim\); got"),
        (
            (Q.repeat(1, 9, 1, 1), CACHE, CACHE, LENGTHS),
            {},
            ValueError,
            "tokens must be 1 to 8; got 9; call attention",
        ),
        (
            (Q[:1].expand(65536, 1, 4, 16), CACHE, CACHE, LENGTHS),
            {},
            ValueError,
            "attention_decode: batch must be at most 65535; got 65536; divide it",
        ),
        ((Q, CACHE.half(), CACHE, LENGTHS), {}, TypeError, "cache_k must have the dtype of q or be torch.float8_e4m3fn; got"),
        ((Q, CACHE, CACHE[:, :4], LENGTHS), {}, ValueError, r"cache_v must have shape \(2, 5, 2, 16\); got \(2, 4, 2, 16\)"),
        ((Q, CACHE, CACHE, LENGTHS.long()), {}, TypeError, "seqlens must be torch.int32; got torch.int64; cast it"),
        ((Q, CACHE[:1], CACHE[:1], LENGTHS), {}, ValueError, r"cache_k must have shape \(2, 5, 2, 16\); got \(1, 5, 2, 16\)"),
        ((Q, CACHE, CACHE, LENGTHS), {"page_table": TABLE[:1]}, ValueError, r"page_table must have shape \(2, pages of a"),
        ((Q, CACHE, CACHE, LENGTHS), {"k_scale": SCALE}, ValueError, "k_scale and v_scale must be given together; got one"),
        ((Q, CACHE, CACHE, LENGTHS), {"k_scale": SCALE, "v_scale": SCALE}, ValueError, "k_scale must be None for a cache of"),
        (
            (Q, CACHE.to(E4M3), CACHE.to(E4M3), LENGTHS),
            {"k_scale": SCALE[:1], "v_scale": SCALE},
            ValueError,
            r"k_scale must have shape \(2,\), or with page_table \(pages, kv_heads\) as k_scale; got \(1,\); expand it",
        ),
        ((Q, CACHE.mT.contiguous().mT, CACHE, LENGTHS), {}, ValueError, "attention_decode: cache_k must be contiguous; got"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        attention_decode(*arguments, **options)


def test_torch_compile_and_gradients():
    compiled = torch.compile(attention_decode, fullgraph=True, backend="aot_eager")
    o, lse = compiled(Q, CACHE, CACHE, LENGTHS)
    assert not o.any()
    assert not lse.any()  # of one key each, whose score is 0
    o, _ = attention_decode(Q.clone().requires_grad_(), CACHE, CACHE, LENGTHS)
    with pytest.raises(NotImplementedError, match="attention_decode: has no gradient; got a backward pass"):
        o.sum().backward()


@pytest.mark.parametrize("file", [sm90_decode, sm90_decode_mma])
@pytest.mark.parametrize("cache", [None, E4M3])
def test_stages(file, cache):
    """Each has one consumer, or all: a consumer that comes to another's would take an older phase for its own."""
    for D in range(16, 520, 8):
        of = problem(D, ARCH, cache=cache, has_few_rows=True)
        if file.takes(of):
            config = file.pick_config(of)
            taking_turns = config.turns if file is sm90_decode else config.warps
            assert config.num_stages % taking_turns == 0


def test_number_of_ranges():
    """As many as fill the SMs once, or else several times; none with less than four blocks of keys, and one at least."""
    of = replace(problem(128, ARCH), num_sms=132)
    config = sm90_decode.pick_config(of)

    def splits(batch, rows, kv_heads, keys):
        return split_kv.num_splits(of, config, batch, rows, kv_heads, keys, apply)

    assert [splits(1, 8, 8, keys) for keys in (0, 500, 4096, 65536)] == [1, 1, 16, 16]
    assert [splits(batch, 8, 8, 65536) for batch in (8, 64)] == [2, 1]
    assert splits(1, 8, 1, 1 << 20) == split_kv.MAX_SPLITS
