"""Kernels compiled before they are called, in parallel processes, into the cache's folder; needs no GPU.

warm("gpt-oss-20b", arch="sm_90a")          what `tilelang-ext warm gpt-oss-20b --arch sm_90a` does
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import NamedTuple

from tilelang_ext.kernels.mxfp4_moe import ahead as mxfp4_moe
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.scaled_mm import ahead as scaled_mm
from tilelang_ext.launch.device import Target
from tilelang_ext.launch.record import kernel

OPERATORS = ("scaled_mm", "mxfp4_moe")
NUM_SMS = {"sm_90a": 132}  # of an H100 SXM, an H200; kernels are made for the number
MAX_ROWS = 8192


class Experts(NamedTuple):
    """The sizes of a mixture of experts in MXFP4."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int


@dataclass(frozen=True)
class Model:
    """What a model calls: its experts, and N and K of its FP8 matmuls."""

    experts: Experts | None = None
    matmuls: tuple[tuple[int, int], ...] = ()
    recipes: tuple[str, ...] = field(default=("row",))  # of `scaled_mm.RECIPES`


# Sizes from the models' configurations on the Hugging Face Hub; those of q, k and v, and of gate and up, are one matmul.
MODELS = {
    "gpt-oss-20b": Model(Experts(32, 4, 2880, 2880)),
    "gpt-oss-120b": Model(Experts(128, 4, 2880, 2880)),
    "llama-3.1-8b-fp8": Model(matmuls=((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))),
    "llama-3.3-70b-fp8": Model(matmuls=((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672))),
}


class Call(NamedTuple):
    """A call that has kernels of its own: the operator, its problem, and arguments of empty tensors."""

    operator: str
    problem: object
    arguments: tuple


class Job(NamedTuple):
    """A kernel to compile: the arguments of `launch.record.kernel`."""

    make: Callable
    arguments: tuple
    arch: str
    pass_configs: tuple


def target_for(arch: str, num_sms: int | None = None) -> Target:
    """Return a target that need not be here. Raises ValueError for another architecture than those of `NUM_SMS`."""
    if arch not in NUM_SMS:
        raise ValueError(f"ahead: arch must be one of {', '.join(NUM_SMS)}; got {arch!r}; compile on the GPU itself")
    return Target("cuda", arch, NUM_SMS[arch] if num_sms is None else num_sms)


def calls_of(models: Iterable[Model], operators: Sequence[str], target: Target, max_rows: int = MAX_ROWS) -> list[Call]:
    """Return a call for every kernel that the models need, for up to `max_rows` rows or tokens."""
    found = []
    for model in models:
        if model.experts and "mxfp4_moe" in operators:
            made = mxfp4_moe.calls(*model.experts, Activation(), target, max_rows)
            found += [Call("mxfp4_moe", *call) for call in made]
        if "scaled_mm" in operators:
            for N, K in model.matmuls:
                made = scaled_mm.calls(N, K, target, max_rows, model.recipes)
                found += [Call("scaled_mm", *call) for call in made]
    return found


def models_of(names: Sequence[str] | None, sizes: Sequence[str], recipes: Sequence[str]) -> list[Model]:
    """Return the models of these names (None: all, unless there are sizes), and one of matmuls of `sizes`, as "4096x7168"."""
    unknown = set(names or ()) - MODELS.keys()
    if unknown:
        raise ValueError(f"export: models must be of {', '.join(MODELS)}; got {', '.join(unknown)}; pass --sizes")
    try:
        matmuls = tuple((int(N), int(K)) for N, K in (size.split("x") for size in sizes))
    except ValueError:
        raise ValueError(f"export: sizes must be as 4096x7168, N and K; got {' '.join(sizes)}; write them so") from None
    models = [MODELS[name] for name in (MODELS if names is None and not sizes else names or ())]
    return [*models, Model(matmuls=matmuls, recipes=tuple(recipes))]


def jobs_of(calls: Iterable[Call], arch: str) -> list[Job]:
    """Return each kernel of the calls once."""
    jobs: dict[Job, None] = {}

    def compile(make: Callable, *arguments, pass_configs=None) -> None:
        jobs[Job(make, arguments, arch, tuple((pass_configs or {}).items()))] = None

    for call in calls:
        {"scaled_mm": scaled_mm, "mxfp4_moe": mxfp4_moe}[call.operator].compile_call(call.problem, compile)
    return list(jobs)


def compile_all(jobs: Sequence[Job], processes: int | None = None) -> None:
    """Compile kernels into the cache's folder in `processes` processes (None: one for each core), with one progress line."""
    start, done = time.monotonic(), 0
    workers = min(processes or os.cpu_count() or 1, max(len(jobs), 1))
    # Not forked, since the compiler's threads would not be there.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for finished in as_completed([pool.submit(_compile, job) for job in jobs]):
            finished.result()
            done += 1
            line = f"\r{done} of {len(jobs)} kernels compiled in {time.monotonic() - start:.0f} s"
            print(line, end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def _compile(job: Job) -> None:
    kernel(*job)


def warm(
    model: str, arch: str, processes: int | None = None, max_rows: int = MAX_ROWS, num_sms: int | None = None
) -> list[Job]:
    """Compile all kernels that a model of `MODELS` needs for up to `max_rows` rows or tokens; return them.

    Raises ValueError for another model.
    """
    if model not in MODELS:
        raise ValueError(f"warm: model must be one of {', '.join(MODELS)}; got {model!r}; add it to ahead.MODELS")
    jobs = jobs_of(calls_of([MODELS[model]], OPERATORS, target_for(arch, num_sms), max_rows), arch)
    compile_all(jobs, processes)
    return jobs
