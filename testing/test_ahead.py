"""Kernels compiled ahead: which a model needs, that another process makes the same, the progress line, the command."""

import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from tilelang_ext import ahead
from tilelang_ext.kernels.mxfp4_moe.launch import tokens_of_kernels
from tilelang_ext.kernels.scaled_mm import selection
from tilelang_ext_cli import main

TARGET = ahead.target_for("sm_90a")
SMALL = ahead.Model(ahead.Experts(4, 2, 128, 64), ((256, 512),), ("tensor", "row", "block", "mx"))


@pytest.fixture(scope="module")
def jobs():
    return ahead.jobs_of(ahead.calls_of([SMALL], ahead.OPERATORS, TARGET, max_rows=128), "sm_90a")


def test_every_number_of_tokens_has_its_kernels():
    calls = ahead.calls_of([ahead.MODELS["gpt-oss-20b"]], ["mxfp4_moe"], TARGET)
    for a_format in ("bfloat16", "fp8"):
        ranges = [tokens_of_kernels(call.problem) for call in calls if call.problem.a_format == a_format]
        assert ranges[0][0] == 1
        assert all(first <= before + 1 <= last for (_, before), (first, last) in itertools.pairwise(ranges))
        assert ranges[-1][1] >= ahead.MAX_ROWS


def test_every_number_of_rows_has_its_kernel():
    matmuls = ahead.MODELS["llama-3.1-8b-fp8"].matmuls
    calls = ahead.calls_of([ahead.MODELS["llama-3.1-8b-fp8"]], ["scaled_mm"], TARGET)
    for N, K in matmuls:
        of_matmul = {call.problem.max_M: call.problem for call in calls if (call.problem.N, call.problem.K) == (N, K)}
        ranges = [selection.sizes_served(problem) for _, problem in sorted(of_matmul.items())]
        assert ranges[0][0] == 1
        assert all(first <= before + 1 <= last for (_, before), (first, last) in itertools.pairwise(ranges))
        assert ranges[-1][1] >= ahead.MAX_ROWS
    assert {(call.problem.N, call.problem.K) for call in calls} == {*matmuls}


def test_another_process_makes_the_same_kernels(jobs):
    """What a kernel is made from is told apart by its value: another process has equal objects, not the same."""
    gate_up = next(job for job in jobs if job.make.__name__ == "gate_up" and "bf16" in str(job.arguments))
    scaled = next(job for job in jobs if "e8m0" in str(job.arguments).lower())
    for job in (gate_up, scaled):
        copy = pickle.loads(pickle.dumps(job))
        assert copy == job
        assert copy.make(*copy.arguments).script() == job.make(*job.arguments).script()


def test_one_progress_line(jobs, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(ahead, "kernel", lambda *job: compiled.append(job))
    monkeypatch.setattr(ahead, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    ahead.compile_all(jobs, processes=2)
    assert sorted(map(str, compiled)) == sorted(str(tuple(job)) for job in jobs)
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert output.splitlines()[-1].startswith(f"{len(jobs)} of {len(jobs)} kernels compiled in ")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("warm gpt-5 --arch sm_90a", "warm: model must be one of gpt-oss-20b, "),
        ("warm gpt-oss-20b --arch sm_80", "ahead: arch must be one of sm_90a; got 'sm_80'; compile on the GPU itself"),
        ("export --ops scaled_mm --arch sm_90a --out x --sizes 4096", "export: sizes must be as 4096x7168, N and K; got 4096"),
        ("export --ops scaled_mm --arch sm_90a --out x --models gpt-5", "export: models must be of gpt-oss-20b, "),
    ],
)
def test_commands_say_what_is_wrong(command, message, capsys):
    assert main(command.split()) == 2
    assert capsys.readouterr().err.startswith(message)
