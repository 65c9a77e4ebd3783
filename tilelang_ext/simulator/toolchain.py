"""The C++ compiler of the simulator: where it is, its flags, and a cache of what it built."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import CompileError, CompilerMissingError

MINIMUM_CLANG = 16
MAXIMUM_CACHED = 4000
# Every half and bfloat operation rounds, nothing contracts, 1.0 is a float; fibers switch without a red zone.
_LANGUAGE = (
    "-std=c++20", "-O2", "-g1", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-exceptions", "-fno-rtti",
    "-fno-threadsafe-statics", "-fno-omit-frame-pointer", "-fno-stack-protector", "-fno-sanitize=undefined", "-fsigned-char",
    "-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none",
    "-w", "-Wno-reserved-user-defined-literal", "-Wno-c++11-narrowing", "-fno-addrsig",
)  # fmt: skip
_CHECK = (
    "-DSIM_CHECK", "-fsanitize=thread", "-Xclang", "-fsanitize=array-bounds", "-Xclang", "-fsanitize-recover=array-bounds",
    "-fno-optimize-sibling-calls",
    "-fno-vectorize", "-fno-slp-vectorize", "-mprefer-vector-width=128", "-ftrivial-auto-var-init=pattern",
    "-mllvm", "-tsan-instrument-func-entry-exit=0", "-mllvm", "-tsan-instrument-atomics=0",
    "-mllvm", "-tsan-instrument-read-before-write=1", "-mllvm", "-instcombine-code-sinking=0",
)  # fmt: skip


# What generated text asks for in words of its own; elsewhere it defines them itself, or refuses to compile.
_MARKS = (
    "-DTL_OUTSIDE(tensor,accesses,shape,lanes,...)=(sim::outside(tensor,accesses,shape,lanes),__VA_ARGS__)",
    "-DTL_ASSERT(condition,message)=sim::assertion(condition,message)",
    "-DTL_PRINTS=1",
)


@dataclass(frozen=True)
class Dialect:
    """A GPU language: how its texts become C++ that this machine compiles.

    Its texts include empty `headers`, and are compiled with the shim `<folder>/shim.h` instead. `defines` hold while a text is
    preprocessed, `flags` while it and the run time are compiled.
    """

    folder: str
    source_name: str  # the name of a text in findings
    headers: tuple[str, ...]
    defines: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


METAL = Dialect(
    "metal",
    "kernel.metal",
    headers=(
        *(f"metal_{n}" for n in (
            "stdlib", "simdgroup", "simdgroup_matrix", "math", "atomic", "common", "compute", "geometric", "integer",
            "limits", "matrix", "pack", "relational", "tensor", "type_traits", "array", "cooperative_tensor", "numeric",
            "utility", "logging",
        )),
        "MetalPerformancePrimitives/MetalPerformancePrimitives.h",
    ),
    defines=("-D__METAL_VERSION__=400", "-D__METAL__=1", "-D__METAL_MACOS__=1"),
    flags=("-Xclang", "-cl-single-precision-constant"),
)  # fmt: skip


@dataclass(frozen=True)
class Compiler:
    """A clang that builds kernels: the start of its command line, its front end alone, and its flags for this machine."""

    command: tuple[str, ...]
    frontend: tuple[str, ...]
    version: str
    machine: tuple[str, ...]


def include_directory() -> Path:
    """Return the folder of the shim and the run time: beside this file in an installation, src/simulator in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "include", here.parents[1] / "src" / "simulator"):
        if (folder / "engine.h").is_file():
            return folder
    raise FileNotFoundError(f"tilelang_ext.simulator: its headers must be installed; got none in {here / 'include'}; reinstall")


@functools.cache
def find_compiler() -> Compiler:
    """Return the newest clang of at least MINIMUM_CLANG on PATH, else the one in PyPI's ziglang."""
    seen = []
    for name in ("clang++", *(f"clang++-{v}" for v in range(30, MINIMUM_CLANG - 1, -1))):
        path = shutil.which(name)
        if path is None:
            continue
        version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
        major = re.search(r"version (\d+)", version)
        # Apple counts its clang by Xcode: 15 is LLVM 16.
        if major and int(major[1]) >= MINIMUM_CLANG - ("Apple" in version):
            machine = ("-march=x86-64-v3", "-mno-red-zone") if _is_x86() else ()
            return Compiler((path,), (path, "-cc1"), version, machine)
        seen.append(version)
    if importlib.util.find_spec("ziglang") is not None:
        version = subprocess.run([sys.executable, "-m", "ziglang", "version"], capture_output=True, text=True).stdout.strip()
        machine = ("-march=x86_64_v3", "-mno-red-zone") if _is_x86() else ()
        zig = (sys.executable, "-m", "ziglang")
        return Compiler((*zig, "cc"), (*zig, "clang", "-cc1"), f"ziglang {version}", machine)
    raise CompilerMissingError(
        f"compiler: the simulator needs clang >= {MINIMUM_CLANG}; got {', '.join(seen) or 'none'} on PATH and no ziglang; "
        "run `pip install ziglang` or `apt-get install clang-19`"
    )


@functools.cache
def _linkers() -> tuple[tuple[str, ...], ...]:
    """Return the commands that assemble and link, the cheapest first; one that fails is followed by the next.

    GNU's take less than half the time of clang's, three processes each of which loads all of LLVM first.
    """
    command = find_compiler().command
    if sys.platform != "linux" or len(command) > 1:
        return (command,)
    lld = subprocess.run([*command, "-print-prog-name=ld.lld"], capture_output=True, text=True).stdout.strip()
    gnu = shutil.which("gcc")
    return (*(((gnu,),) if gnu else ()), (*command, *(("-fuse-ld=lld",) if shutil.which(lld) else ())))


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def cache_directory() -> Path:
    """Return the folder of the cache: in the user's home, or a temporary one if the home cannot be written."""
    folder = Path.home() / ".cache" / "tilelang_ext" / "simulator"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / f"tilelang_ext-simulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # since programs are run from here
        raise PermissionError(f"cache: must be the user's own folder; got {folder} of another user; remove it")
    return folder


def _forget_oldest(folder: Path) -> None:
    """Keep the cache small: past MAXIMUM_CACHED, remove the least recently used half. Other processes may do the same."""
    entries = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                entries.append((path.stat().st_mtime, path))
    if len(entries) > MAXIMUM_CACHED:
        for _, path in sorted(entries)[: MAXIMUM_CACHED // 2]:
            path.unlink(missing_ok=True)


@functools.cache
def _shim_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(include_directory().rglob("*.h")):
        digest.update(path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    digest.update("\0".join((*find_compiler().command, find_compiler().version)).encode())
    return digest.hexdigest()


def cached(name: str, key: Sequence[str], build) -> Path:
    """Return the file that `build(folder)` makes for this key; it is built once, and two builders at once do no harm."""
    digest = hashlib.sha256("\0".join((_shim_digest(), *key)).encode()).hexdigest()[:32]
    target = cache_directory() / f"{digest}-{name}"
    try:
        os.utime(target)  # marked as used, so that no other process removes it meanwhile
    except FileNotFoundError:
        _forget_oldest(cache_directory())
        with tempfile.TemporaryDirectory(dir=cache_directory()) as folder:
            made = build(Path(folder))
            try:
                os.replace(made, target)
            except OSError:  # a folder that another process put there in the meantime
                if not target.exists():
                    raise
    return target


def run_compiler(arguments: Sequence[str | Path], what: str) -> str:
    """Run the compiler and return its standard output; CompileError holds its messages."""
    return _run((find_compiler().command,), arguments, what)


def _run(commands: Sequence[Sequence[str]], arguments: Sequence[str | Path], what: str) -> str:
    """Run the first of the commands that succeeds; CompileError holds the messages of the last."""
    for command in commands:
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
        if not done.returncode:
            break
    else:
        raise CompileError(
            f"source: must be text that the shim compiles; got an error in {what}; correct the line named\n{done.stderr}"
        )
    return done.stdout


def run_frontend(arguments: Sequence[str | Path]) -> str:
    """Return the messages of the front end about a text; errors in the text are no failure."""
    return subprocess.run([*find_compiler().frontend, *map(str, arguments)], capture_output=True, text=True).stderr


def preprocess(dialect: Dialect, source: Path, include_directories: Sequence[Path]) -> str:
    """Return the text with macros and includes expanded, and line markers."""
    stubs = cached("stubs", dialect.headers, lambda folder: _make_stubs(folder, dialect.headers))
    includes = [f"-I{d}" for d in (stubs, *include_directories)]
    return run_compiler(
        ("-E", "-x", "c++", "-std=c++20", "-nostdinc", "-w", *_MARKS, *dialect.defines, *includes, source), "preprocessing"
    )


def _make_stubs(folder: Path, headers: Sequence[str]) -> Path:
    for header in headers:
        path = folder / "stubs" / header
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder / "stubs"


def build(dialect: Dialect, text: str, check: bool) -> Path:
    """Compile one translated kernel to a program, which is cached by its text."""
    return cached("kernel", (text, *dialect.flags, str(check)), lambda folder: _build(folder, dialect, text, check))


def _build(folder: Path, dialect: Dialect, text: str, check: bool) -> Path:
    source, assembly, program = folder / "kernel.cpp", folder / "kernel.s", folder / "kernel"
    source.write_text(text)
    flags = (*_LANGUAGE, *dialect.flags, *find_compiler().machine, *(_CHECK if check else ()))
    run_compiler(("-S", "-x", "c++", *flags, "-include-pch", _shim(dialect, flags), source, "-o", assembly), "compiling")
    assembly.write_text(add_line_table(assembly.read_text()))
    libraries = ("-lm", *(() if sys.platform == "darwin" else ("-ldl",)))
    _run(_linkers(), (assembly, _runtime(dialect), "-o", program, *libraries), "linking")
    return program


def _shim(dialect: Dialect, flags: Sequence[str]) -> Path:
    """Return the precompiled shim, which saves a seventh of the work on a kernel."""
    header = include_directory() / dialect.folder / "shim.h"
    # The cache identifies headers by content; the compiler would compare their time stamps.
    untimed = ("-Xclang", "-fno-pch-timestamp")

    def precompile(folder: Path) -> Path:
        run_compiler(("-x", "c++-header", *flags, *untimed, header, "-o", folder / "shim.pch"), "compiling the shim")
        return folder / "shim.pch"

    return cached("shim.pch", (str(header), *flags), precompile)


def _runtime(dialect: Dialect) -> Path:
    def compile_runtime(folder: Path) -> Path:
        source = include_directory() / "runtime.h"
        flags = (*_LANGUAGE, *dialect.flags, *find_compiler().machine)
        run_compiler((*flags, "-c", "-x", "c++", source, "-o", folder / "runtime.o"), "compiling the run time")
        return folder / "runtime.o"

    return cached("runtime.o", dialect.flags, compile_runtime)


_LOCATION = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"')
# Calls that look up the line they came from: the checks, and where lanes wait (sim::meet, sim::threadgroup_barrier).
_CALLBACK = re.compile(r"\s*(?:callq?|bl)\s+_?(?:__tsan_|_ZN3sim4meet|_ZN3sim19threadgroup_barrier)")


def add_line_table(assembly: str) -> str:
    """Label the return address of each check's call, and append a table of (address, line, file) for the findings."""
    out, table, files, place = [], [], {}, ("0", "0")
    for line in assembly.splitlines():
        out.append(line)
        if found := _LOCATION.match(line):
            place = found.groups()
        elif found := _FILE.match(line):
            files[found[1]] = found[2]
        elif _CALLBACK.match(line):
            out.append(f"Lsim{len(table)}:")
            table.append(place)
    prefix = "_" if sys.platform == "darwin" else ""
    names = list(files) or ["0"]
    number = {name: i for i, name in enumerate(names)}
    out += [".section __DATA,__const" if prefix else '.section .data.rel.ro,"aw"', ".p2align 3"]
    out.append(f".globl {prefix}sim_line_count\n{prefix}sim_line_count: .long {len(table)}")
    out.append(f".p2align 3\n.globl {prefix}sim_lines\n{prefix}sim_lines:")
    out += [f".long Lsim{i} - .\n.long {line}\n.long {number.get(file, 0)}" for i, (file, line) in enumerate(table)]
    out.append(f".p2align 3\n.globl {prefix}sim_files\n{prefix}sim_files:")
    out += [f".quad Lsimfile{i}" for i in range(len(names))]
    out += [f'Lsimfile{i}: .asciz "{files.get(name, "")}"' for i, name in enumerate(names)]
    return "\n".join(out) + "\n"
