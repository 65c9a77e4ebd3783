"""The result of a simulated launch: counts and findings."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path


@dataclass(frozen=True)
class Counts:
    """Operations of one launch, summed over its threadgroups.

    `mma` counts 8x8x8 MMAs of a simdgroup; a larger MMA counts as the number of 8x8x8 ones that it equals.
    Bytes are those that threads access, and are counted only with `check=True` (None otherwise). `threadgroup_barriers` are
    counted once per threadgroup, simdgroup operations once per simdgroup.
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
    """A fault seen in a run, or a note: its kind, the line of the kernel's text, and the first thread that showed it."""

    kind: str  # "out of bounds", "race", "uninitialised", "divergence", "limit", "operand", "address space", "assertion"
    message: str
    line: int
    text: str  # the text of that line
    file: str
    threadgroup: tuple[int, int, int]
    thread: tuple[int, int, int]
    count: int  # number of times that it was seen

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return (
            f"{where}: {self.kind}: {self.message} (threadgroup {self.threadgroup}, thread {self.thread}, "
            f"{self.count} times)\n    {self.text.strip()}"
        )


@dataclass(frozen=True)
class Report:
    """Result of a simulated launch: what the text computes and which memory it accesses. It says nothing about speed."""

    counts: Counts
    findings: tuple[Finding, ...]
    threadgroup_memory: int  # bytes declared by one threadgroup
    checked: bool
    instructions: Mapping[str, int] = field(default_factory=dict)  # HIP: how often waves ran each matrix instruction, by name
    outputs: tuple = ()  # tensors that the function returns, where the caller passed none for them

    # What may be meant: accesses that a guard of the text turned into 0 or dropped ("outside"), and writes of the value that
    # another thread writes ("same value").
    notes: tuple[Finding, ...] = ()
    printed: tuple[str, ...] = ()  # by T.print, thread by thread
    text_file: Path | None = None  # holds the text whose lines findings and notes name; None without any

    @staticmethod
    def of_launches(reports: Sequence[Report], outputs: tuple = ()) -> Report:
        """Return the report of several launches: counts added, findings one after the other, the largest threadgroup memory."""
        first = reports[0]
        sums = {}
        for f in fields(Counts):
            values = [getattr(report.counts, f.name) for report in reports]
            sums[f.name] = None if None in values else sum(values)
        instructions = collections.Counter()
        for report in reports:
            instructions.update(report.instructions)
        return replace(
            first,
            counts=Counts(**sums),
            findings=tuple(finding for report in reports for finding in report.findings),
            notes=tuple(note for report in reports for note in report.notes),
            printed=tuple(line for report in reports for line in report.printed),
            text_file=next((report.text_file for report in reports if report.text_file is not None), None),
            threadgroup_memory=max(report.threadgroup_memory for report in reports),
            instructions=dict(sorted(instructions.items())),
            outputs=outputs,
        )

    def strict(self) -> Report:
        """Return the report with accesses that a guard hid among its findings."""
        hidden = tuple(note for note in self.notes if note.kind == "outside")
        return replace(
            self,
            findings=(*self.findings, *hidden),
            notes=tuple(note for note in self.notes if note not in hidden),
        )

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
        if self.notes:
            lines += [f"notes: {len(self.notes)}", *map(str, self.notes)]
        if self.text_file is not None:
            lines.append(f"lines are those of {self.text_file}")
        return "\n".join(lines)
