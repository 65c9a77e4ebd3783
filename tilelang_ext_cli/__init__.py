"""The `tilelang-ext` command. It stands outside the package, since it must speak when `import tilelang_ext` cannot."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run `tilelang-ext` with `arguments` (default: the command line) and return its exit code."""
    parser = argparse.ArgumentParser(prog="tilelang-ext", description="TileLang kernels and a Metal backend with a simulator.")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what is installed, what is missing, what that disables and how to get it")
    doctor.set_defaults(run=_doctor)
    warm = commands.add_parser("warm", help="compile all kernels of a model into the cache, in parallel; needs nvcc, no GPU")
    warm.add_argument("model", help="as gpt-oss-20b; another name lists all")
    _add_target(warm)
    warm.set_defaults(run=_warm)
    export = commands.add_parser("export", help="write kernels that need torch and apache-tvm-ffi alone; needs nvcc, no GPU")
    export.add_argument("--ops", nargs="+", required=True, choices=("scaled_mm", "mxfp4_moe"))
    export.add_argument("--out", type=Path, required=True, metavar="DIR")
    export.add_argument("--models", nargs="+", metavar="MODEL", help="whose sizes are exported; all, unless --sizes is given")
    export.add_argument("--sizes", nargs="+", default=[], metavar="NxK", help="of matmuls, as 4096x7168")
    export.add_argument("--recipes", nargs="+", default=["row"], choices=("tensor", "row", "block", "mx"), help="of --sizes")
    export.add_argument("--wheel", action="store_true", help="a wheel of the package too, beside it")
    export.add_argument("--hub", action="store_true", help="the layout of kernels of the Hugging Face Hub too")
    _add_target(export)
    export.set_defaults(run=_export)
    tune = commands.add_parser("tune", help="measure which kernels are fastest on this GPU, for sizes or a model's matmuls")
    tune.add_argument("operator", choices=("scaled_mm",))
    tune.add_argument("sizes", nargs="+", metavar="SIZE|MODEL", help="as 16x4096x7168, M, N and K; or a model, as for warm")
    tune.add_argument("--kinds", nargs="+", choices=("row_fast", "row", "block"), help="of scales and accumulation; all")
    tune.add_argument("--candidates", type=int, default=12, help="choices per size, the fastest by the model")
    tune.add_argument("--processes", type=int, help="that compile at the same time; one for each core, unless given")
    tune.add_argument("--out", type=Path, metavar="FILE", help="the table, in place of the one in the cache's folder")
    tune.set_defaults(run=_tune)
    chosen = parser.parse_args(arguments)
    try:
        return chosen.run(chosen)
    except (ValueError, OSError, RuntimeError) as error:
        if chosen.command == "doctor":
            raise
        print(error, file=sys.stderr)
        return 2


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", required=True, help="as sm_90a")
    parser.add_argument("--num-sms", type=int, help="of the GPU, 132 unless given")
    parser.add_argument("--max-rows", type=int, default=8192, help="rows of a, or tokens, up to which there are kernels")
    parser.add_argument("--processes", type=int, help="that compile at the same time; one for each core, unless given")


def _doctor(chosen: argparse.Namespace) -> int:
    from tilelang_ext_cli.doctor import diagnose, show

    checks = diagnose()
    show(checks)
    return 1 if any(check.required and not check.ok for check in checks) else 0


def _warm(chosen: argparse.Namespace) -> int:
    from tilelang_ext.ahead import warm
    from tilelang_ext.launch import cache

    jobs = warm(chosen.model, chosen.arch, chosen.processes, chosen.max_rows, chosen.num_sms)
    print(f"{len(jobs)} kernels of {chosen.model} for {chosen.arch} are in {cache.folder()}")
    return 0


def _export(chosen: argparse.Namespace) -> int:
    from tilelang_ext import ahead, export

    models = ahead.models_of(chosen.models, chosen.sizes, chosen.recipes)
    target = ahead.target_for(chosen.arch, chosen.num_sms)
    calls = ahead.calls_of(models, chosen.ops, target, chosen.max_rows)
    ahead.compile_all(ahead.jobs_of(calls, chosen.arch), chosen.processes)
    package = export.export(calls, chosen.arch, chosen.out)
    print(package)
    if chosen.wheel:
        print(export.wheel(package, chosen.out))
    if chosen.hub:
        print(export.hub(package, chosen.out, chosen.arch))
    return 0


def _tune(chosen: argparse.Namespace) -> int:
    from tilelang_ext.ahead import MODELS
    from tilelang_ext.tune import tune

    models = [MODELS[name] for name in chosen.sizes if name in MODELS]
    sizes = [name for name in chosen.sizes if name not in MODELS]
    options = {"kinds": chosen.kinds, "candidates": chosen.candidates, "processes": chosen.processes, "path": chosen.out}
    print(tune(chosen.operator, sizes, [matmul for model in models for matmul in model.matmuls], **options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
