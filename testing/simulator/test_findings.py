"""Each fault that can hide behind right numbers is planted in a clean text and found at its line."""

from dataclasses import replace

import pytest
import torch
from simulator.kernels import line_of, plant, run_gemm

from simulator import kernels
from tilelang_ext.simulator import execute_msl, launch
from tilelang_ext.simulator.report import Finding

TILES_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);  // tiles"
TOP_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);  // top"
LOAD_A, STORE_B = "simdgroup_load(a[i]", "b_s[thread_index + i * 128] ="
MMA = "simdgroup_multiply_accumulate("


def kinds_at(report, line):
    return {f.kind for f in report.findings if f.line == line}


def test_missing_barrier_before_the_mma():
    source = plant(kernels.GEMM, TILES_BARRIER, "")
    report, _, _ = run_gemm(source)
    assert kinds_at(report, line_of(source, LOAD_A)) & {"race", "uninitialised"}
    assert any(f.kind == "race" for f in report.findings)


def test_missing_barrier_at_the_loop_top():
    source = plant(kernels.GEMM, TOP_BARRIER, "")
    report, _, _ = run_gemm(source)
    assert "race" in kinds_at(report, line_of(source, STORE_B))


@pytest.mark.parametrize("flag", ["mem_none", "mem_device"])
def test_barrier_with_the_wrong_flag(flag):
    source = plant(kernels.GEMM, TILES_BARRIER, f"threadgroup_barrier(mem_flags::{flag});")
    report, c, reference = run_gemm(source)
    assert (c - reference).abs().max() < 1e-4  # the numbers are right all the same
    assert "race" in kinds_at(report, line_of(source, LOAD_A))


BARRIERS = ("mem_device", "mem_threadgroup", "mem_texture", "mem_none")


def test_barriers_order_the_memory_that_they_name():
    """An exchange in device memory, between simdgroups and within one, and accesses that lie across an end."""
    source = kernels.HEADER + (
        "kernel void f(device float* y [[buffer(0)]], device float* z [[buffer(1)]], constant int& which [[buffer(2)]],\n"
        " uint i [[thread_position_in_grid]]) {\n  threadgroup float a[6];\n  y[i] = i;\n"
        + "".join(f"  if (which == {n}) threadgroup_barrier(mem_flags::{flag});\n" for n, flag in enumerate(BARRIERS))
        + "".join(f"  if (which == {n + 4}) simdgroup_barrier(mem_flags::{flag});\n" for n, flag in enumerate(BARRIERS))
        + "  if (which < 8) z[i] = y[i ^ (which < 4 ? 32 : 1)];\n"
        "  if (which == 8 && i == 0) *(threadgroup long*)(a + 5) = 1;\n"
        "  if (which == 9 && i == 0) *(device long*)(z + 63) = 1;\n}\n"
    )

    def found(which):
        arguments = torch.zeros(64), torch.zeros(64), torch.tensor([which], dtype=torch.int32)
        return execute_msl(source, "f", arguments, grid=(1, 1, 1), threads=(64, 1, 1)).findings

    kinds = [{finding.kind for finding in found(which)} for which in range(8)]
    assert kinds == 2 * [set(), {"race"}, {"race"}, {"race"}]
    ends = "8 bytes at byte 20 of threadgroup array 'a' of 24 bytes", "8 bytes at byte 252 of buffer 'z' of 256 bytes"
    assert [found(which)[0].message for which in (8, 9)] == [f"write of {end}" for end in ends]


def test_read_past_a_device_buffer():
    source = plant(kernels.GEMM, "= B[k * 64 +", "= B[(k + 16) * 64 +")
    report, _, _ = run_gemm(source)
    (finding,) = report.findings
    assert (finding.kind, finding.line) == ("out of bounds", line_of(source, STORE_B))
    assert "of buffer 'B' of 8192 bytes" in finding.message
    assert finding.text == source.splitlines()[finding.line - 1]
    assert report.text_file.read_text() == source
    assert f"lines are those of {report.text_file}" in str(report)


def test_write_past_a_device_buffer():
    a, b, c = torch.ones(40), torch.ones(40), torch.zeros(40)
    params = torch.tensor([64, 0, 0, 0], dtype=torch.int32)
    report = execute_msl(kernels.VECTOR_ADD, "add", [a, b, c, params], grid=(1, 1, 1), threads=(64, 1, 1))
    (finding,) = report.findings
    assert finding.kind == "out of bounds"
    assert finding.count == 3 * 24


def test_small_threadgroup_array():
    source = plant(kernels.GEMM, "half a_s[64 * 16]", "half a_s[64 * 16 - 8]")
    report, c, reference = run_gemm(source)
    assert (c - reference).abs().max() < 1e-4
    assert "out of bounds" in kinds_at(report, line_of(source, LOAD_A))
    assert any("threadgroup array 'a_s' of 2032 bytes" in f.message for f in report.findings)


def test_uninitialised_threadgroup_memory():
    source = plant(kernels.GEMM, "for (int i = 0; i < 8; ++i) b_s[", "for (int i = 0; i < 7; ++i) b_s[")
    report, _, _ = run_gemm(source)
    assert kinds_at(report, line_of(source, "simdgroup_load(b[j]")) == {"uninitialised"}


def test_divergent_barrier():
    source = plant(kernels.GEMM, TILES_BARRIER, "if (thread_index != 77) " + TILES_BARRIER)
    report, _, _ = run_gemm(source)
    assert any(f.kind == "divergence" for f in report.findings)
    assert {f.line for f in report.findings if f.kind == "divergence"} & {
        line_of(source, "// tiles"), line_of(source, LOAD_A), line_of(source, TOP_BARRIER),
    }  # fmt: skip


def test_mma_skipped_by_one_lane():
    source = plant(kernels.GEMM, MMA, "if (lane != 5) " + MMA)
    report, _, _ = run_gemm(source)
    line = line_of(source, MMA)
    (finding,) = [f for f in report.findings if f.line == line]
    assert finding.kind == "divergence"
    assert "31 of 32 lanes; lane 5 is missing" in finding.message


def test_one_lane_returns_early():
    source = plant(kernels.GEMM, "for (int k = 0;", "if (thread_index == 40) return;\n  for (int k = 0;")
    report, _, _ = run_gemm(source)
    assert "divergence" in kinds_at(report, line_of(source, MMA))
    barrier = [f for f in report.findings if f.line == line_of(source, "// top")]
    assert "127 of 128 threads" in barrier[0].message


def test_two_groups_write_one_element():
    source = plant(kernels.ROW_SUM, "y[group.x] = total", "y[group.x / 2] = total")
    x = torch.ones(4, 256)
    for workers, differ in ((1, True), (2, True), (1, False)):
        x[1::2] = 2.0 if differ else 1.0
        report = execute_msl(source, "row_sum", [x, torch.zeros(4)], grid=(4, 1, 1), threads=(256, 1, 1), workers=workers)
        found, others = (report.findings, report.notes) if differ else (report.notes, report.findings)
        (finding,) = found
        assert others == ()
        assert (finding.kind, finding.line) == ("race" if differ else "same value", line_of(source, "= total"))
        assert "'y'" in finding.message
        assert finding.threadgroup in ((1, 0, 0), (3, 0, 0)) or workers == 2


def test_one_group_reads_what_another_writes():
    source = kernels.HEADER + (
        "kernel void shift(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {\n  x[i] = x[i ^ 32];\n}"
    )
    report = execute_msl(source, "shift", [torch.zeros(64)], grid=(2, 1, 1), threads=(32, 1, 1))
    assert {f.kind for f in report.findings} == {"race"}


def run_exchange(source):
    y = torch.zeros(32, dtype=torch.int32)
    return execute_msl(source, "exchange", [y], grid=(1, 1, 1), threads=(32, 1, 1)), y


def test_exchange_inside_a_simdgroup():
    report, y = run_exchange(kernels.EXCHANGE)
    assert report.findings == ()
    assert torch.equal(y, (torch.arange(32) ^ 1).int() * 3)
    source = plant(kernels.EXCHANGE, "simdgroup_barrier(mem_flags::mem_threadgroup);", "")
    report, _ = run_exchange(source)
    assert "race" in {f.kind for f in report.findings}


def test_plain_write_beside_atomics_is_a_race():
    atomic = "  atomic_fetch_add_explicit(total,"
    source = plant(kernels.HISTOGRAM, atomic, "  if (i == 3) *(device float*)total = 0;\n" + atomic)
    x, bins, total = torch.zeros(128, dtype=torch.int32), torch.zeros(16, dtype=torch.int32), torch.zeros(1)
    report = execute_msl(source, "histogram", [x, bins, total], grid=(1, 1, 1), threads=(128, 1, 1))
    assert "race" in {f.kind for f in report.findings}


def test_private_index_past_the_end():
    source = kernels.HEADER + (
        "kernel void f(device float* y [[buffer(0)]], constant int& n [[buffer(1)]], uint i [[thread_position_in_grid]]) {\n"
        "  float v[4] = {1, 2, 3, 4};\n"
        "  v[n] += 1;\n"
        "  y[i] = v[0] + v[i & 3];\n}"
    )
    y = torch.zeros(32)
    for n, found in ((3, 0), (4, 1)):
        argument = torch.tensor([n], dtype=torch.int32)
        report = execute_msl(source, "f", [y, argument], grid=(1, 1, 1), threads=(32, 1, 1))
        assert len(report.findings) == found
    assert (report.findings[0].kind, report.findings[0].line) == ("out of bounds", line_of(source, "v[n] += 1"))
    assert "index 4" in report.findings[0].message


def test_too_much_threadgroup_memory():
    source = plant(kernels.EXCHANGE, "int box[32]", "int box[8193]")
    report, _ = run_exchange(source)
    assert {f.kind for f in report.findings} == {"limit"}


def test_report_reads_well():
    report, _ = run_exchange(plant(kernels.EXCHANGE, "simdgroup_barrier(mem_flags::mem_threadgroup);", ""))
    text = str(report)
    assert "nothing here is a measure of speed" in text
    assert "box[lane ^ 1]" in text or "box[lane] = lane * 3" in text


ADDRESS_SPACES = [
    ("device half* to threadgroup half*", "threadgroup half* p = A;"),
    ("a cast between spaces", "threadgroup half4* p = (threadgroup half4*)(A + 4);"),
    ("thread memory as device memory", "float v[4]; device float* p = v;"),
    ("threadgroup memory as device memory", "device half* p = a_s + 8;"),
    ("an argument of another space", "half h = first(a_s);"),
]


@pytest.mark.parametrize("statement", [s for _, s in ADDRESS_SPACES], ids=[name for name, _ in ADDRESS_SPACES])
def test_wrong_address_space(statement):
    source = plant(kernels.GEMM, "  const int row =", f"  {statement}  // wrong\n  const int row =")
    source = plant(source, "[[kernel,", "half first(device const half* p) { return p[0]; }\n[[kernel,")
    source = plant(source, "const device half* A", "device half* A")
    report, _, _ = run_gemm(source)
    (finding,) = report.findings
    assert (finding.kind, finding.line) == ("address space", line_of(source, "// wrong"))


def test_right_address_spaces():
    source = plant(
        kernels.GEMM,
        "  const int row =",
        "  threadgroup half4* p = (threadgroup half4*)((threadgroup char*)a_s + 16);\n"
        "  half h[4]; thread half4& v = *(thread half4*)(&h[0]); v = half4(1.0h); p += v.xy.x > 2.0h;\n"
        "  const int row =",
    )
    assert run_gemm(source)[0].findings == ()


EVERY_LANE_STORES = """
kernel void f(device int* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  threadgroup int cell[2];
  cell[0] = VALUE;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = cell[0];
}"""


@pytest.mark.parametrize(("value", "kind"), [("5", "same value"), ("int(i) / 31", "race")])
def test_threads_that_store_one_value(value, kind):
    """Equal values in no order are a note; one thread that stores another value makes it a race."""
    source = kernels.HEADER + EVERY_LANE_STORES.replace("VALUE", value)
    report = execute_msl(source, "f", [torch.zeros(32, dtype=torch.int32)], grid=(1, 1, 1), threads=(32, 1, 1))
    found = report.findings if kind == "race" else report.notes
    assert {(f.kind, f.line, "'cell'" in f.message) for f in found} == {(kind, line_of(source, "cell[0] ="), True)}
    if kind == "same value":
        assert report.findings == ()
        assert found[0].count == 31
        assert "notes: 1" in str(report)


def test_threadgroups_that_end_with_one_value():
    """The last store of a threadgroup is judged before the next one has the memory."""
    source = kernels.HEADER + (
        "kernel void f(device int* y [[buffer(0)]], uint g [[threadgroup_position_in_grid]],\n"
        "              uint i [[thread_index_in_threadgroup]]) {\n"
        "  threadgroup int cell[2];\n  y[g * 32 + i] = 1;\n  cell[0] = int(g) + 7;\n}"
    )
    report = execute_msl(source, "f", [torch.zeros(256, dtype=torch.int32)], grid=(8, 1, 1), threads=(32, 1, 1))
    assert report.findings == ()
    assert [(note.kind, note.count) for note in report.notes] == [("same value", 8 * 31)]


@pytest.mark.parametrize(("value", "kind"), [("3", "same value"), ("0x3030303 + 0x1010101 * (int(i) / 31)", "race")])
def test_threads_that_fill_with_one_value(value, kind):
    """The compiler makes one access of these stores, as long as the fill."""
    source = kernels.HEADER + (
        "kernel void f(device uchar* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {\n"
        f"  for (int j = 0; j < 300; ++j) y[j] = uchar({value});\n}}"
    )
    y = torch.full((300,), 3, dtype=torch.uint8)
    report = execute_msl(source, "f", [y], grid=(1, 1, 1), threads=(32, 1, 1))
    found = report.findings if kind == "race" else report.notes
    assert [(f.kind, f.line) for f in found] == [(kind, line_of(source, "y[j] ="))]
    assert kind == "race" or report.findings == ()


@pytest.mark.parametrize(("value", "kinds"), [("7", set()), ("int(g)", {"race"})])
def test_threadgroups_that_store_one_value(monkeypatch, value, kinds):
    """A process may look at a place before another has stored there; if it reports a race, one process runs it again."""
    source = kernels.HEADER + (
        "kernel void f(device int* y [[buffer(0)]], uint g [[threadgroup_position_in_grid]]) {\n"
        f"  for (int j = 0; j < 8; ++j) y[j] = {value};\n}}"
    )
    workers = []

    def as_if_it_looked_too_early(program, arguments, text, given):
        workers.append(given.workers)
        report, results = run(program, arguments, text, given)
        message = "write of 4 bytes at byte 0 of buffer 'y' is not ordered after a write by another thread"
        early = (Finding("race", message, 3, "", "kernel.metal", (0, 0, 0), (0, 0, 0), 1),)
        return (replace(report, findings=early) if given.workers > 1 else report), results

    run = launch._run
    monkeypatch.setattr(launch, "_run", as_if_it_looked_too_early)
    y = torch.zeros(8, dtype=torch.int32)
    report = execute_msl(source, "f", [y], grid=(16, 1, 1), threads=(32, 1, 1), workers=2)
    assert {finding.kind for finding in report.findings} == kinds
    assert workers == [2, 1]
    assert value != "7" or y.eq(7).all()


def test_index_past_a_private_array_names_it():
    source = kernels.HEADER + (
        "kernel void f(device int* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {\n"
        "  int first[4] = {1, 2, 3, 4}, second[2] = {1, 2};\n  y[i] = first[i & 3] + second[i & 3];\n}"
    )
    report = execute_msl(source, "f", [torch.zeros(32, dtype=torch.int32)], grid=(1, 1, 1), threads=(32, 1, 1))
    assert "is past the end of the array 'second'" in report.findings[0].message


def test_registers_of_hundreds_of_kilobytes():
    """The stack of a thread holds them, and what the checks add to it."""
    source = kernels.HEADER + (
        "kernel void f(device int* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {\n  int big[100000];\n"
        "  for (int k = 0; k < 100000; ++k) big[k] = k ^ int(i);\n  simdgroup_barrier(mem_flags::mem_none);\n"
        "  y[i] = big[(i * 3001) % 100000];\n}"
    )
    y = torch.zeros(32, dtype=torch.int32)
    report = execute_msl(source, "f", [y], grid=(1, 1, 1), threads=(32, 1, 1))
    assert report.findings == ()
    assert torch.equal(y, torch.arange(32, dtype=torch.int32) * 3001 ^ torch.arange(32, dtype=torch.int32))
