"""One launch: arguments go into a mapped job file, the kernel's program runs on it, results come back from it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import re
import signal
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from . import toolchain
from .errors import CrashError, SimulatorError, TimeLimitError
from .report import Counts, Finding, Report

KINDS = ("out of bounds", "race", "uninitialised", "divergence", "limit", "operand", "assertion", "outside", "same value")
NOTES = ("outside", "same value")  # no faults of the text
# Of two threadgroups that write one place: which value the first wrote may not be there yet when the second one looks, if
# another process runs it. One process tells equal values from others for certain.
_UNSURE = re.compile(r"write of \d+ bytes at byte \d+ of buffer .* is not ordered after a write")
MAX_BUFFERS, MAX_FINDINGS, COUNTS, MAX_INSTRUCTIONS = 32, 256, 11, 64
_RECORD = struct.Struct("<QI")
_MAGIC = 0x314D4953474E4C54
_GUARD = 64 << 10  # unused bytes around each buffer, so that a small overrun does no harm


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("constant", ctypes.c_uint32),
        ("writable", ctypes.c_uint32),
        ("name", ctypes.c_char * 64),
    ]


class _Finding(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_uint32),
        ("line", ctypes.c_uint32),
        ("group", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("count", ctypes.c_uint64),
        ("place", ctypes.c_uint64),
        ("file", ctypes.c_char * 256),
        ("message", ctypes.c_char * 512),
    ]


class _Instruction(ctypes.Structure):
    _fields_ = [("count", ctypes.c_uint64), ("name", ctypes.c_char * 56)]


class _Job(ctypes.Structure):
    """Mirrors `Job` of src/simulator/job.h."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("magic", "file_size", "seed", "memory_limit")),
        *((name, ctypes.c_uint64) for name in ("threadgroup_limit", "dynamic_size")),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        *((name, ctypes.c_uint32) for name in ("workers", "check", "buffer_count", "done_workers")),
        ("counts", ctypes.c_uint64 * COUNTS),
        ("threadgroup_memory", ctypes.c_uint64),
        ("lock", ctypes.c_uint32),
        ("finding_count", ctypes.c_uint32),
        ("instructions", _Instruction * MAX_INSTRUCTIONS),
        ("buffers", _Buffer * MAX_BUFFERS),
        ("findings", _Finding * MAX_FINDINGS),
    ]


class Argument:
    """The bytes of one buffer argument, which can be written back to the caller's array."""

    def __init__(self, index: int, value, constant: bool, writable: bool, name: str):
        self.index, self.value, self.constant, self.writable, self.name = index, value, constant, writable, name
        self.bytes = self._as_bytes()

    def _as_bytes(self) -> np.ndarray:
        if isinstance(self.value, (bytes, bytearray, memoryview)):
            if self.writable:
                raise TypeError(
                    f"arguments[{self.index}]: a buffer that the kernel writes needs an array; got bytes; pass a tensor"
                )
            return np.frombuffer(self.value, np.uint8)
        if isinstance(self.value, np.ndarray):
            return np.ascontiguousarray(self.value).reshape(-1).view(np.uint8)
        if type(self.value).__module__.partition(".")[0] == "torch":
            import torch

            if self.value.device.type != "cpu":
                raise TypeError(
                    f"arguments[{self.index}]: must be a CPU tensor; got device {self.value.device}; call .cpu() and copy back"
                )
            return self.value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        raise TypeError(
            f"arguments[{self.index}]: must be a torch CPU tensor, a numpy array or bytes; "
            f"got {type(self.value).__name__}; convert it"
        )

    def write_back(self, result: np.ndarray) -> None:
        if np.array_equal(result, self.bytes):
            return
        if isinstance(self.value, np.ndarray):
            if not self.value.flags.writeable:
                raise ValueError(f"arguments[{self.index}]: the kernel writes it; got a read-only array; pass a writable one")
            self.value[...] = result.view(self.value.dtype).reshape(self.value.shape)
            return
        import torch

        with torch.no_grad():
            self.value.copy_(torch.from_numpy(result.copy()).view(self.value.dtype).reshape(self.value.shape))


@dataclass(frozen=True)
class Launch:
    """How a program is run. Sizes are bytes of threadgroup memory: what the GPU has, and what the launch asks for."""

    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    check: bool
    seed: int
    timeout: float
    workers: int | None
    threadgroup_limit: int
    dynamic_size: int = 0

    def __post_init__(self) -> None:
        for name in ("grid", "threads"):
            value = getattr(self, name)
            shape = tuple(int(v) for v in value)
            least = 0 if name == "grid" else 1
            if len(shape) != 3 or min(shape) < least:
                raise ValueError(f"{name}: must be three numbers of at least {least}; got {value!r}; pass (x, y, z)")
            object.__setattr__(self, name, shape)
        if math.prod(self.threads) > 1024:
            raise ValueError(f"threads: at most 1024 per threadgroup; got {self.threads}; use fewer")
        object.__setattr__(self, "workers", max(1, min(self.workers or os.cpu_count() or 1, math.prod(self.grid), 64)))


@dataclass(frozen=True)
class Text:
    """A text as it was given, and as the compiler saw it: findings name lines of the first, and columns of the second."""

    source: str
    name: str  # in findings
    translated: str

    @functools.cached_property
    def lines(self) -> list[str]:
        return self.source.splitlines()

    @functools.cached_property
    def translated_lines(self) -> dict[int, str]:
        """The lines of the translated text by their numbers in the source."""
        lines, number, own = {}, 1, False
        for line in self.translated.splitlines():
            if marker := re.match(r'# (\d+) "([^"]*)"', line):
                number, own = int(marker[1]), marker[2] == self.name
                continue
            if own:
                lines.setdefault(number, line)
            number += 1
        return lines

    @functools.cached_property
    def path(self) -> Path:
        """A file that holds the source."""
        return toolchain.cached(self.name, (self.source,), lambda folder: _write(folder / self.name, self.source))


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def run(program: Path, arguments: Sequence[Argument], text: Text, launch: Launch) -> Report:
    """Run `program` in processes of its own; write results into the arguments; print what it prints; return the report."""
    report, results = _run(program, arguments, text, launch)
    if launch.workers > 1 and any(_UNSURE.match(finding.message) for finding in report.findings):
        with contextlib.suppress(TimeLimitError):  # then the first report stands, with what may be no race
            report, results = _run(program, arguments, text, replace(launch, workers=1))
    for line in report.printed:
        print(line, end="")
    for argument, result in results:
        argument.write_back(result)
    return report


def _run(
    program: Path, arguments: Sequence[Argument], text: Text, launch: Launch
) -> tuple[Report, list[tuple[Argument, np.ndarray]]]:
    """Run `program`; return the report, and the bytes of each argument that it may write."""
    job = _Job(magic=_MAGIC, seed=launch.seed % 2**64, workers=launch.workers, check=launch.check)
    job.threadgroup_limit, job.dynamic_size = launch.threadgroup_limit, launch.dynamic_size
    job.grid[:], job.threads[:] = launch.grid, launch.threads
    offset = _round_up(ctypes.sizeof(_Job)) + _GUARD
    job.buffer_count = max((a.index + 1 for a in arguments), default=0)
    for a in arguments:
        size = len(a.bytes)
        job.buffers[a.index] = _Buffer(offset, size, a.constant, a.writable, a.name.encode()[:63])
        offset = _round_up(offset + size) + _GUARD
    job.file_size = offset
    job.memory_limit = (4 << 30) + offset * 20
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.NamedTemporaryFile(prefix="tilelang_ext-", dir=shared) as file:
        file.truncate(offset)
        os.pwrite(file.fileno(), bytes(job), 0)
        for a in arguments:
            os.pwrite(file.fileno(), memoryview(a.bytes), job.buffers[a.index].offset)
        code, printed = _run_program(program, file.name, launch.timeout)
        job = _Job.from_buffer_copy(os.pread(file.fileno(), ctypes.sizeof(_Job), 0))
        report = _read_report(job, text, printed)
        if code != 0 or job.done_workers != launch.workers:
            for line in printed:
                print(line, end="")
            raise _crash(code, report)
        results = [
            (a, np.fromfile(file.name, np.uint8, len(a.bytes), offset=job.buffers[a.index].offset))
            for a in arguments
            if a.writable
        ]
    return report, results


def _round_up(n: int) -> int:
    return (n + 4095) // 4096 * 4096


def _run_program(program: Path, job_file: str, timeout: float) -> tuple[int, tuple[str, ...]]:
    """Return the program's exit code and what it printed."""
    with tempfile.TemporaryFile() as output:
        code = _wait(
            subprocess.Popen([str(program), job_file], stdin=subprocess.DEVNULL, stdout=output, start_new_session=True), timeout
        )
        output.seek(0)
        return code, _printed(output.read())


def _printed(records: bytes) -> tuple[str, ...]:
    """Return the texts of records of (thread, size, text), by thread."""
    texts, at = [], 0
    while at + _RECORD.size <= len(records):
        thread, size = _RECORD.unpack_from(records, at)
        at += _RECORD.size
        texts.append((thread, records[at : at + size].decode(errors="replace")))
        at += size
    return tuple(text for _, text in sorted(texts, key=lambda record: record[0]))


def _wait(process: subprocess.Popen, timeout: float) -> int:
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise TimeLimitError(
            f"timeout: the kernel must end within it; got no end after {timeout:g} s; "
            "look for a loop that never ends, or raise timeout"
        ) from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _crash(code: int, report: Report) -> SimulatorError:
    number = -code if code < 0 else code - 128
    if code in (3, 4):
        reason = {3: "ran out of threadgroup memory", 4: "could not map its memory"}[code]
    else:
        reason = signal.Signals(number).name if number in set(signal.Signals) else f"exit code {code}"
    found = "\n".join(map(str, report.findings)) or "nothing was found before; run with check=True to see which access was wild"
    return CrashError(f"kernel: must run to its end; got {reason}; see what was found before it died\n{found}", report)


def _read_report(job: _Job, text: Text, printed: tuple[str, ...]) -> Report:
    checked = bool(job.check)
    values = dict(
        zip(
            ("mma", "device_bytes_read", "device_bytes_written", "constant_bytes_read", "threadgroup_bytes_read",
             "threadgroup_bytes_written", "threadgroup_barriers", "simdgroup_barriers", "shuffles", "reductions", "atomics"),
            job.counts,
            strict=True,
        )
    )  # fmt: skip
    if not checked:
        values = {k: None if "bytes" in k else v for k, v in values.items()}
    findings: dict[tuple, Finding] = {}
    for f in job.findings[: min(job.finding_count, MAX_FINDINGS)]:
        file, kind, message = f.file.decode(errors="replace"), KINDS[f.kind], f.message.decode(errors="replace")
        own = file == text.name
        key = (kind, file, f.line, message if kind == "outside" else "") if f.line else (kind, message)
        if key in findings:
            continue
        line = text.lines[f.line - 1] if own and 0 < f.line <= len(text.lines) else ""
        message = _complete(message, f, kind, text if own else None)
        findings[key] = Finding(kind, message, f.line, line, file, tuple(f.group), tuple(f.thread), f.count)
    ordered = sorted(findings.values(), key=lambda f: (f.file, f.line, f.kind))
    instructions = {i.name.decode(): i.count for i in job.instructions if i.count}
    return Report(
        counts=Counts(**values),
        findings=tuple(f for f in ordered if f.kind not in NOTES),
        threadgroup_memory=job.threadgroup_memory,
        checked=checked,
        instructions=dict(sorted(instructions.items())),
        notes=tuple(f for f in ordered if f.kind in NOTES),
        printed=printed,
        text_file=text.path if ordered else None,
    )


def _complete(message: str, finding: _Finding, kind: str, text: Text | None) -> str:
    """Return the message with what only this side knows: a count, or the name at a column of the text."""
    if kind == "outside":
        ending = "read as 0" if " reads " in message else "dropped"
        return f"{message.replace('#', format(finding.count, ','), 1)} {ending}"
    if text is not None and message.endswith("of the array"):
        line, column = text.translated_lines.get(finding.line, ""), finding.place & 0xFFFFFFFF
        if name := re.match(r"\w+", line[column - 1 :] if column else ""):
            return f"{message} '{name[0]}'"
    return message
