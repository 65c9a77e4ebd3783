"""What a simulated launch tells: its counts and its findings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Counts:
    """Operations of one launch, summed over its threadgroups.

    `mma` counts 8x8x8 multiply-accumulates of a simdgroup; a larger matrix operation counts as many as it equals.
    Bytes are those of each thread's own accesses and are counted with `check=True` only (None without).
    `threadgroup_barriers` are counted once a threadgroup; simdgroup operations once a simdgroup.
    """

    mma: int
    device_bytes_read: int | None
    device_bytes_written: int | None
    constant_bytes_read: int | None
    threadgroup_bytes_read: int | None
    threadgroup_bytes_written: int | None
    threadgroup_barriers: int
    simdgroup_barriers: int
    shuffles: int
    reductions: int
    atomics: int


@dataclass(frozen=True)
class Finding:
    """A fault seen in a run: what, where in the kernel's text, and by which thread first."""

    kind: str  # "out of bounds", "race", "uninitialised", "divergence", "limit", "operand", "address space"
    message: str
    line: int
    text: str  # of that line
    file: str
    threadgroup: tuple[int, int, int]
    thread: tuple[int, int, int]
    count: int  # how often it was seen

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return (
            f"{where}: {self.kind}: {self.message} (threadgroup {self.threadgroup}, thread {self.thread}, "
            f"{self.count} times)\n    {self.text.strip()}"
        )


@dataclass(frozen=True)
class Report:
    """Result of a simulated launch. It says what the text computes and touches; it says nothing about speed."""

    counts: Counts
    findings: tuple[Finding, ...]
    threadgroup_memory: int  # bytes declared by one threadgroup
    checked: bool
    instructions: Mapping[str, int] = field(
        default_factory=dict
    )  # HIP: matrix instructions by name, as often as a wave ran them

    def __str__(self) -> str:
        lines = ["simulated launch (counts and findings; nothing here is a measure of speed)"]
        for f in fields(self.counts):
            value = getattr(self.counts, f.name)
            lines.append(f"  {f.name.replace('_', ' '):<26}{'not counted' if value is None else format(value, ',')}")
        lines.append(f"  {'threadgroup memory':<26}{self.threadgroup_memory:,}")
        lines += [f"  {name:<26}{count:,}" for name, count in self.instructions.items()]
        if not self.checked:
            lines.append("findings: not looked for (check=False)")
        else:
            lines.append(f"findings: {len(self.findings) or 'none'}")
            lines += [str(f) for f in self.findings]
        return "\n".join(lines)
