"""The mixture-of-experts benchmark: counts, a hand count of bytes, wrong results stop it, peers get what they document."""

import csv
import re
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmark")]

import bench_mxfp4_moe as bench  # noqa: E402
import harness  # noqa: E402
import mxfp4_moe_cases as cases  # noqa: E402
from bench_mxfp4_moe import MODELS, Case  # noqa: E402

from tilelang_ext import quantization, reference  # noqa: E402
from tilelang_ext.formats import E2M1, E4M3, BlockScaledLayout  # noqa: E402

MX = BlockScaledLayout.e8m0_k32()


def run(*arguments):
    return bench.main([str(a) for a in arguments])


def test_counts_beside_the_minimum(tmp_path, capsys):
    table = tmp_path / "rows.csv"
    ours, minimum = run("--target", "metal", "--tokens", 1, "--csv", table)
    assert (ours["provider"], minimum["provider"]) == ("ours", "minimum")
    assert ours["findings"] == 0
    assert ours["mma"] > 0
    assert minimum["device_bytes_read"] == 2 * 3 * 128 * 96 * 17 // 32 + 2 * 128  # two experts and x
    assert minimum["device_bytes_written"] == 2 * 128
    assert ours["device_bytes_read"] > minimum["device_bytes_read"]
    assert ours["read_per_weight"] == ours["device_bytes_read"] / (2 * 3 * 128 * 96 * 17 // 32)
    with open(table) as file:
        assert [row["provider"] for row in csv.DictReader(file)] == ["ours", "minimum"]
    output = capsys.readouterr().out
    assert "no speed" in output
    assert not re.search(r"FLOP|\bus\b|GB/s", output)


def test_bytes_are_a_hand_count():
    """4 experts of gpt-oss at one token: half a byte per element and one byte per 32, x and y in two bytes."""
    case = Case(MODELS["gpt-oss-120b"], 1, "bf16", "cuda", "cuda")
    assert case.bytes(4) == 4 * 3 * 2880 * 2880 // 2 + 4 * 3 * 2880 * 2880 // 32 + 2 * 2 * 2880
    assert case.flops == 2 * 4 * (2 * 2880 * 2880 + 2880 * 2880)


def test_a_wrong_result_stops_the_count(monkeypatch):
    """Nothing is written here; the report is not looked at."""
    monkeypatch.setattr(bench.metal, "lower", lambda prim_func, target: prim_func)
    monkeypatch.setattr(bench, "simulate", lambda *arguments, **options: None)
    with pytest.raises(AssertionError, match="small, 1 tokens, bf16: ours: cosine of a row -1"):
        run("--target", "metal", "--tokens", 1)


def test_lowers_without_a_device_and_says_so(monkeypatch):
    """Every launch, of which the shortest is lowered for this test."""
    lower, names = bench.tilelang.lower, []

    def shortest(prim_func, **options):
        names.append(prim_func.attrs["global_symbol"])
        return lower(prim_func, **options) if names[-1] == "sum_slots" else types.SimpleNamespace(kernel_source="a\nb\n")

    monkeypatch.setattr(bench.tilelang, "lower", shortest)
    monkeypatch.setattr(harness, "usable_cuda", lambda: "no driver")
    (row,) = run("--target", "cuda", "--models", "gpt-oss-20b", "--tokens", 1)
    assert (names[0], names[-1]) == ("moe_sort", "sum_slots")
    assert row["lines"] > 2 * (len(names) - 1) + 20
    assert row["status"] == f"{len(names)} kernels lowered for sm_90a, not run: no driver"
    assert "us" not in row


# --- peers, as they are documented, in float64 -----------------------------------------------------------------------


@dataclass
class Routing:
    gate_scal: torch.Tensor
    expt_hist: torch.Tensor
    n_expts_tot: int
    n_expts_act: int
    expt_data: object = None


@dataclass
class Indices:
    src_indx: torch.Tensor
    dst_indx: torch.Tensor


@dataclass
class Weight:
    data: torch.Tensor
    dtype: object = None
    layout: dict = field(default_factory=dict)


def fake_matmul_ogs(x, w, bias, routing, gather_indx=None, scatter_indx=None, precision_config=None, gammas=None, **rest):
    """Rows by expert; gather and scatter indices count slots; codes (E, K / 2, N), scales (E, K / 32 padded to 4, N)."""
    codes, scale = w.data.mT, precision_config["weight_scale"].data.mT
    assert w.layout == {"mx_axis": 1}
    assert precision_config["weight_scale"].layout == {"mx_axis": 1, "num_warps": 8}
    assert scale.shape[-1] % 4 == 0
    assert len(routing.expt_hist) == routing.n_expts_tot == len(codes)
    weights = reference.dequantize(codes, scale[..., : codes.shape[-1] // 16], E2M1, MX)
    ends = routing.expt_hist.cumsum(0).tolist()
    top_k, y, rows = routing.n_expts_act, rest["y"], []
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        place = torch.arange(start, end)
        source = place if gather_indx is None else gather_indx.src_indx[place] // top_k
        row = x[source].double() @ weights[expert].T + bias[expert]
        rows.append(row if gammas is None else row * gammas[place, None])
    rows = torch.cat(rows)
    if "fused_activation" in rest:
        specs, (alpha, limit), reduction = rest["fused_activation"]
        assert (specs, reduction) == (("swiglu", "swiglu_fn", ("alpha", "limit")), 2)
        rows = reference.swiglu(rows, alpha, limit, "interleaved")
    if scatter_indx is None:
        y.copy_(rows[None])
    else:
        y.zero_()
        y[0].index_add_(0, scatter_indx.dst_indx.long() // top_k, rows.to(y.dtype))


def fake_triton_kernels(constraints):
    def module(name, **names):
        made = types.ModuleType(name)
        made.__dict__.update(names)
        made.__path__ = []
        return made

    def convert_layout(tensor, layout, **options):
        assert layout == "layout"
        return Weight(tensor.data, tensor.dtype, options)

    opt_flags = module(
        "opt_flags", reset_opt_flags_constraints=constraints.clear, update_opt_flags_constraints=constraints.update
    )
    layout = module(
        "layout",
        make_default_matmul_mxfp4_w_layout=lambda mx_axis: ("layout", {"mx_axis": mx_axis}),
        make_default_matmul_mxfp4_w_scale_layout=lambda mx_axis, num_warps: (
            "layout",
            {"mx_axis": mx_axis, "num_warps": num_warps},
        ),
    )
    routing = module(
        "routing",
        RoutingData=Routing,
        GatherIndx=Indices,
        ScatterIndx=Indices,
        compute_expt_data_torch=lambda hist, experts, slots: (experts, slots),
    )
    parts = {
        "": module("triton_kernels", routing=routing),
        ".matmul_ogs": module(
            "matmul_ogs",
            matmul_ogs=fake_matmul_ogs,
            FlexCtx=dict,
            PrecisionConfig=dict,
            FnSpecs=lambda *arguments: arguments,
            FusedActivation=lambda *arguments: arguments,
        ),
        ".matmul_ogs_details": module("matmul_ogs_details", opt_flags=opt_flags),
        ".numerics": module("numerics", InFlexData=dict),
        ".swiglu": module("swiglu", swiglu_fn="swiglu_fn"),
        ".tensor": module(
            "tensor", FP4="FP4", convert_layout=convert_layout, wrap_torch_tensor=lambda t, dtype=None: Weight(t, dtype)
        ),
        ".tensor_details": module("tensor_details", layout=layout),
    }
    return {f"triton_kernels{name}": part for name, part in parts.items()}


def fake_humming_forward(config, x, outputs, input_scale, sorted_ids, expert_ids, num_tokens_padded, top_k, **rest):
    """Blocks of slots with one expert each; a slot past the end is padding; row of x: slot // top_k."""
    assert rest["compute_config"] == '{"gemm_type": "indexed"}'
    block = int(re.search(r"\[(\d+)", rest["tuning_config"]).group(1))
    assert len(sorted_ids) == num_tokens_padded == block * len(expert_ids)
    if config["fp8"] and input_scale is None:
        x, input_scale = quantization.quantize(x, E4M3, BlockScaledLayout.per_row())
    x = x.double() if input_scale is None else x.double() * input_scale
    weights = reference.dequantize(rest["weight"].view(torch.uint8), rest["weight_scale"], E2M1, MX)
    for expert, slots in zip(expert_ids.tolist(), sorted_ids.view(-1, block), strict=True):
        slots = slots[slots < len(outputs)]
        outputs[slots] = (x[slots // top_k] @ weights[expert].T + rest["bias"][expert]).to(outputs.dtype)


def fake_may_process_input(config, inputs, activation_type, activation_impl):
    """The expression is C++ of floats a, b: the halves of a row."""
    assert activation_type == "binary_split"
    a, b = inputs.double().chunk(2, -1)
    functions = {"fminf": lambda x, y: x.clamp(max=y), "fmaxf": lambda x, y: x.clamp(min=y), "__expf": torch.exp}
    y = eval(re.sub(r"([\d.]+)f\b", r"\1", activation_impl), {**functions, "a": a, "b": b})
    if not config["fp8"]:
        return y.to(inputs.dtype), None, None
    codes, scale = quantization.quantize(y, E4M3, BlockScaledLayout.per_row())
    return codes, None, scale


def fake_humming():
    def module(**names):
        made = types.ModuleType("humming")
        made.__dict__.update(names)
        made.__path__ = []
        return made

    def prepare_layer_config(rows, k, schema, activations, **options):
        assert schema == {"b_dtype": "float4e2m1", "bs_dtype": "float8e8m0", "weight_scale_group_size": 32}
        assert options["pad_n_to_multiple"] == 128
        return {"fp8": activations == {"a_dtype": "float8e4m3"}}

    def weighted_sum(rows, weights, out):
        out.copy_((rows.view(*weights.shape, -1).double() * weights[..., None]).sum(1))

    return {
        "humming": module(),
        "humming.forward": module(humming_forward=fake_humming_forward, may_process_input=fake_may_process_input),
        "humming.schema": module(),
        "humming.schema.humming": module(HummingInputSchema=dict, HummingWeightSchema=dict),
        "humming.transform": module(
            prepare_layer_config=prepare_layer_config, transform_humming_tensors=lambda config, tensors: tensors
        ),
        "humming.tune": module(get_heuristics_config=lambda config, shape_m, gemm_type: {"block_shape": (8, 128, 64)}),
        "weighted_sum_triton": module(weighted_sum=weighted_sum),
    }


@pytest.fixture
def peers(monkeypatch):
    constraints = {"idle_sms": 4}  # somebody else's
    for name, module in {**fake_triton_kernels(constraints), **fake_humming()}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return constraints


@pytest.mark.parametrize("a_dtype", ["bf16", "fp8"])
def test_providers_agree(monkeypatch, peers, a_dtype):
    """Every provider computes the layer, on every set of inputs; the sets' weights exceed the cache."""
    monkeypatch.setattr(bench, "cache_bytes", lambda device: 60_000)
    timed = []

    def timing(calls):
        timed.append([call() for call in calls])
        return {0: 3.0, 1: 6.0, 2: 2.0}[len(timed) - 1]

    monkeypatch.setattr(bench, "time_mps", timing)
    checked = []
    real = bench.check
    monkeypatch.setattr(bench, "check", lambda *arguments: checked.append(arguments) or real(*arguments))
    case = Case(MODELS["small"], 9, a_dtype, "cuda", "cpu")
    rows = bench.measure_time(case, list(bench.PROVIDERS), seed=0, copy_speed=5.0)
    names = {"bf16": ["ours", "triton_kernels", "humming"], "fp8": ["ours", "humming"]}[a_dtype]
    assert [row["provider"] for row in rows] == [provider for _, provider, *_ in checked] == names
    assert rows[0]["speed_of_best_peer"] == {"bf16": 2.0 / 3.0, "fp8": 6.0 / 3.0}[a_dtype]
    assert rows[0]["tflops"] == case.flops / 3.0 / 1e6
    assert rows[0]["floor_bytes"] == case.bytes(4)
    assert rows[0]["share_of_copy"] == case.bytes(4) / 3.0 / 5.0
    assert all((row["least_cosine"] < 0.9999) == (a_dtype == "fp8") for row in rows), "fp8 is less exact"
    assert all(len(calls) == rows[0]["calls"] for calls in timed)
    assert rows[0]["calls"] * case.bytes(4) > 3 * 60_000
    if a_dtype == "bf16":
        assert peers == {"split_k": 1}


def test_all_calls_are_right(monkeypatch, peers):
    """Not the first set of inputs alone: each call writes its own output, from its own layer."""
    monkeypatch.setattr(bench, "cache_bytes", lambda device: 60_000)
    monkeypatch.setattr(bench, "time_mps", lambda calls: [call() for call in calls] and 1.0)
    outputs = []
    monkeypatch.setattr(Case, "output", lambda case, device: outputs.append(torch.empty(1, 128).bfloat16()) or outputs[-1])
    case = Case(MODELS["small"], 1, "bf16", "cuda", "cpu")
    layers = [case.layer(seed, "cpu") for seed in range(3)]
    for provider in bench.PROVIDERS:
        outputs.clear()
        (row,) = bench.measure_time(case, [provider], seed=0, copy_speed=None)
        assert row["calls"] == len(outputs) == 5
        for i, out in enumerate(outputs):
            bench.check(case, provider.name, out, bench.expected(layers[i % 3], case.inputs(i, "cpu")))


def test_wrong_results_stop_the_benchmark(monkeypatch):
    case = Case(MODELS["small"], 3, "bf16", "cuda", "cpu")
    layer, inputs = case.layer(0, "cpu"), case.inputs(0, "cpu")
    want = bench.expected(layer, inputs)
    bench.check(case, "ours", want.bfloat16(), want)
    with pytest.raises(AssertionError, match=r"small, 3 tokens, bf16: ours: cosine of a row -1.0000"):
        bench.check(case, "ours", torch.full_like(want, torch.nan), want)
    swapped = layer.w2._replace(codes=layer.w2.codes >> 4 | layer.w2.codes << 4)
    with pytest.raises(AssertionError, match="cosine of a row"):
        bench.check(case, "ours", bench.expected(layer._replace(w2=swapped), inputs), want)
    off = want.clone()
    off[1, 5] += want.square().mean().sqrt() / 10
    with pytest.raises(AssertionError, match=r"max error 0.\d+ at \(1, 5\), limit 0.03"):
        bench.check(case, "ours", off, want)


def test_a_provider_that_writes_nothing_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr(bench, "cache_bytes", lambda device: 60_000)
    idle = harness.Provider("humming", "", ("cuda",), lambda case, layer: lambda inputs, out: lambda: None)
    with pytest.raises(AssertionError, match="humming: cosine of a row -1"):
        bench.measure_time(Case(MODELS["small"], 3, "bf16", "cuda", "cpu"), [bench.PROVIDERS[0], idle], seed=0, copy_speed=None)


def test_expected_is_the_reference():
    case = Case(MODELS["small"], 6, "bf16", "cuda", "cpu")
    layer, inputs = case.layer(0, "cpu"), case.inputs(0, "cpu")
    d13, d2 = (reference.dequantize(w.codes, w.scale, E2M1, MX) for w in layer)
    options = {"bias13": layer.w13.bias, "bias2": layer.w2.bias, "activation": lambda v: reference.swiglu(v, gate="separated")}
    torch.testing.assert_close(bench.expected(layer, inputs), reference.moe(*inputs, d13, d2, **options))


def test_plot(tmp_path, monkeypatch):
    rows = [
        {"case": model, "tokens": tokens, "provider": provider, "a_dtype": "bf16", "us": us * tokens**0.5, "share_of_copy": 0.5}
        for model in ("gpt-oss-20b", "small")
        for provider, us in (("ours", 10.0), ("humming", 11.0))
        for tokens in (1, 16)
    ]
    drawn = bench.lines(rows)
    assert {row["line"] for row in drawn} == {"ours, bf16", "humming, bf16", "bytes at copy speed"}
    assert drawn[-1]["us"] == 22.0
    file, plotted = tmp_path / "chart.png", []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, *line, **style: plotted.append(line[:2]) or plot(axes, *line, **style))
    bench.plot_lines(str(file), drawn, panel="case", x="tokens", series="line", value="us", title="t", label="us")
    assert plotted[:3] == [((1, 16), (10.0, 40.0)), ((1, 16), (11.0, 44.0)), ((1, 16), (5.5, 22.0))]
    assert len(plotted) == 6
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="needs rows with us; got none"):
        bench.plot_lines(
            str(file), [{"case": "small"}], panel="case", x="tokens", series="line", value="us", title="t", label="us"
        )


def test_optional_providers(monkeypatch):
    monkeypatch.setattr(cases, "find_spec", lambda name: None)
    assert [p.name for p in bench.PROVIDERS if not bench.installed(p)] == ["triton_kernels", "humming"]
    monkeypatch.setattr(cases, "find_spec", lambda name: name == "humming" or None)
    assert [p.name for p in bench.PROVIDERS if not bench.installed(p)] == ["triton_kernels"]


def test_the_example_needs_a_gpu(monkeypatch):
    import bench_moe_example

    assert bench_moe_example.tile_of("144x192x384") == bench_moe_example.example.MANY
    monkeypatch.setattr(bench_moe_example, "find_device", lambda target: ("cuda", "none", "torch sees no such GPU"))
    with pytest.raises(SystemExit, match="must run on an NVIDIA Hopper GPU; got torch sees no such GPU"):
        bench_moe_example.main([])


def test_bad_arguments(monkeypatch):
    with pytest.raises(SystemExit, match="humming: left out, exists on cuda"):
        run("--target", "metal", "--providers", "humming")
    monkeypatch.setattr(bench, "find_device", lambda target: ("hip", "cuda", None))
    with pytest.raises(SystemExit, match="--target: mxfp4_moe exists on metal, metal4, cuda; got hip"):
        run()
