"""`tilelang-ext doctor`: every part that the project can use, whether it is here, and what to do when it is not."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[1] / "tilelang_ext"
REINSTALL = "pip install --no-build-isolation -e ."
ON_MAC = sys.platform == "darwin"


@dataclass(frozen=True)
class Check:
    """One part: what was found, and when it is not `ok`, what that `disables` and the `fix`.

    A part that this kind of machine cannot have (a GPU it lacks, MLX off macOS) is ok and not `present`.
    """

    group: str
    name: str
    found: str
    ok: bool = True
    required: bool = False
    disables: str = ""
    fix: str = ""
    present: bool = True


def diagnose() -> list[Check]:
    """Look at this machine; nothing is installed, built or changed."""
    library = _native_library()
    return [*_versions(), library, _package(library), *_compilers(), *_gpus()]


def show(checks: list[Check]) -> None:
    """Print the parts as a table, then what is missing; plain text where rich is not installed."""
    missing = [check for check in checks if not check.ok]
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        for check in checks:
            print(f"{_mark(check)[0]:8}{check.group:16}{check.name:18}{check.found}")
        for check in missing:
            print(f"\n{_mark(check)[0]} {check.name}; disables {check.disables}\n    {check.fix}")
        return
    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "part", "name"):
        table.add_column(column, no_wrap=True)
    table.add_column("found", overflow="fold")
    group = None
    for check in checks:
        word, colour = _mark(check)
        table.add_row(f"[{colour}]{word}[/]", check.group if check.group != group else "", check.name, escape(check.found))
        group = check.group
    console.print(table)
    for check in missing:
        word, colour = _mark(check)
        console.print(f"\n[{colour}]{word}[/] [bold]{check.name}[/]; disables {escape(check.disables)}", highlight=False)
        console.print(f"    {escape(check.fix)}", style="cyan", highlight=False, soft_wrap=True)
    if not missing:
        console.print("\nNothing is missing.")


def _mark(check: Check) -> tuple[str, str]:
    if check.ok:
        return ("ok", "green") if check.present else ("-", "dim")
    return ("MISSING", "red") if check.required else ("absent", "yellow")


def _versions() -> Iterator[Check]:
    yield Check("versions", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    required = {
        "tilelang": ("everything", "pip install tilelang==0.1.15"),
        "torch": ("everything", "pip install torch==2.13.0"),
        "apache-tvm-ffi": ("everything", "pip install 'apache-tvm-ffi>=0.1.11,<0.1.13'"),
    }
    for name, (disables, fix) in required.items():
        version = _version(name)
        yield Check("versions", name, version or "not installed", version is not None, True, disables, fix)
    version = _version("mlx")
    if ON_MAC:
        yield Check(
            "versions", "mlx", version or "not installed", version is not None, False, "kernels on mx.array", "pip install mlx"
        )
    else:
        yield Check("versions", "mlx", version or "only for macOS", present=version is not None)


def _native_library() -> Check:
    part = {
        "group": "package",
        "name": "native library",
        "required": True,
        "disables": "everything: it is the Metal code generator",
    }
    try:
        native = _module_at("_tilelang_ext_native", PACKAGE / "native.py")
        path = native.find_library()
        native.load_library()
    except (ImportError, OSError) as error:
        return Check(ok=False, **_split(error), **part)
    return Check(found=f"{path.name}, {path.stat().st_size / 1e6:.1f} MB, digest {native.library_digest()}", **part)


def _package(library: Check) -> Check:
    part = {"group": "package", "name": "tilelang_ext", "required": True, "disables": "everything"}
    try:
        package = importlib.import_module("tilelang_ext")
    except ImportError as error:
        found = _split(error)
        return Check(
            ok=False,
            **({"found": "needs the native library", "fix": library.fix} if found["found"] == library.found else found),
            **part,
        )
    return Check(found=f"imports, {_version('tilelang_ext') or 'from ' + Path(package.__file__).parent.name + '/'}", **part)


def _split(error: Exception) -> dict[str, str]:
    """An error of the project says rule, value and fix, parted by semicolons."""
    what, _, fix = str(error).rpartition("; ")
    return {"found": what or str(error), "fix": fix or REINSTALL}


def _compilers() -> Iterator[Check]:
    simulator = _module_at("_tilelang_ext_simulator", PACKAGE / "simulator" / "__init__.py")
    disables = "executing kernels; they still lower to Metal text"
    try:
        compiler = simulator.find_compiler()
        yield Check("compilers", "simulator", f"{compiler.version} ({Path(compiler.command[0]).name})", required=True)
    except simulator.CompilerMissingError as error:
        yield Check("compilers", "simulator", _split(error)["found"], False, True, disables, "pip install ziglang==0.15.2")

    nvcc = _first_line("nvcc", "--version", r"release .*")
    yield Check(
        "compilers", "nvcc", nvcc or "not on PATH", nvcc is not None, False,
        "running target cuda (lowering to CUDA text works without)",
        "install the CUDA toolkit 12 or 13 and put its bin folder on PATH",
    )  # fmt: skip
    yield _amd_compiler()


def _amd_compiler() -> Check:
    toolchain = _module_at("_tilelang_ext_rocm_toolchain", PACKAGE / "rocm" / "toolchain.py")
    try:
        return Check("compilers", "hipcc or clang", toolchain.find_compiler().version)
    except toolchain.CompilerMissingError as error:
        disables = "compiling target hip (lowering to HIP text works without)"
        return Check("compilers", "hipcc or clang", _split(error)["found"], False, False, disables, _split(error)["fix"])


def _gpus() -> Iterator[Check]:
    try:
        import torch
    except ImportError:
        return
    if torch.version.hip:
        found, ok = _devices(torch) if torch.cuda.is_available() else ("none seen by torch", False)
        yield Check(
            "gpus",
            "ROCm",
            found,
            ok,
            False,
            "running target hip",
            "install the AMD driver and ROCm that this torch was built for",
        )
    else:
        yield _cuda(torch)
        if shutil.which("rocm-smi") or shutil.which("amd-smi"):
            yield Check(
                "gpus",
                "ROCm",
                "AMD tools present, torch without ROCm",
                False,
                False,
                "running target hip",
                "install a ROCm build of torch",
            )
        else:
            yield Check("gpus", "ROCm", "none; kernels lower to HIP text", present=False)
    if not ON_MAC:
        yield Check("gpus", "MPS", "none; kernels for Metal run in the simulator", present=False)
    elif torch.backends.mps.is_available():
        yield Check("gpus", "MPS", f"available, macOS {platform.mac_ver()[0]}")
    else:
        yield Check(
            "gpus",
            "MPS",
            "not available to torch",
            False,
            False,
            "running target metal",
            "use an arm64 Python on Apple silicon: pip install torch==2.13.0",
        )


def _cuda(torch: ModuleType) -> Check:
    if torch.cuda.is_available():
        found, ok = _devices(torch)
        return Check(
            "gpus", "CUDA", found, ok, False, "running target cuda", "update the NVIDIA driver to one that serves this torch"
        )
    if driver := _first_line("nvidia-smi", "-L", r"GPU \d+: [^(]*"):
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        fix = (
            "update the NVIDIA driver" if torch.version.cuda else "install a CUDA build of torch 2.13.0 in place of the CPU one"
        )
        return Check("gpus", "CUDA", f"{driver.strip()}, but {built}", False, False, "running target cuda", fix)
    return Check("gpus", "CUDA", "none; kernels lower to CUDA text", present=False)


def _devices(torch: ModuleType) -> tuple[str, bool]:
    names = []
    try:
        for i in range(torch.cuda.device_count()):
            torch.zeros(1, device=f"cuda:{i}").add_(1).item()
            names.append(torch.cuda.get_device_name(i))
    except RuntimeError as error:
        return f"{len(names)} usable, then: {str(error).partition(chr(10))[0]}", False
    return ", ".join(names), bool(names)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _first_line(command: str, argument: str, pattern: str) -> str | None:
    """The first part of a command's output that matches; None if there is no such command or it fails."""
    path = shutil.which(command)
    if path is None:
        return None
    try:
        done = subprocess.run([path, argument], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(pattern, done.stdout)
    return match[0] if done.returncode == 0 and match else None


def _module_at(name: str, path: Path) -> ModuleType:
    """Import one file or folder of the package by itself, so that a package that cannot be imported can be asked."""
    if not path.is_file():
        raise ImportError(f"tilelang_ext: must be installed; got no file {path}; {REINSTALL}")
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
