"""Find pointers that change their address space: a second, syntax-only pass compiles the text as C++ for OpenCL.

The C++ that runs has no address spaces, so it accepts `threadgroup half* p = A;` for a device pointer A. OpenCL does not:
device is __global, threadgroup __local, constant __constant, thread __private. Its other errors are not about Metal
and are dropped; a text that it cannot follow gets no finding rather than a false one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import toolchain
from .msl import rewrite_declarations
from .report import Finding
from .tokens import next_token, text_at, tokenize

_SPACES = {"device": "__global", "threadgroup": "__local", "constant": "__constant", "thread": "__private"}
_VECTOR = re.compile(r"(?:char|uchar|short|ushort|int|uint|long|ulong|half|bfloat|float)[234]")
_ERROR = re.compile(r"^(?P<file>[^:\n]+):(?P<line>\d+):\d+: error: (?P<message>.*)$", re.MULTILINE)
_POINTER_ITSELF = re.compile(r"([*&]) ?__(?:private|generic)")  # the space of the pointer, not of what it points to


def as_opencl(preprocessed: str, constants: Mapping[int, object]) -> str:
    """Return the text with its address spaces spelled as in OpenCL."""
    tokens = tokenize(preprocessed)
    rewrite_declarations(tokens, constants)
    for i, token in enumerate(tokens):
        if token.kind != "name":
            continue
        if token.text in _SPACES:
            token.text = _SPACES[token.text]
        elif token.text in ("kernel", "restrict", "__restrict"):
            token.text = ""
        elif _VECTOR.fullmatch(token.text) and text_at(tokens, next_token(tokens, i)) == "(":
            token.text = f"make<{token.text}>"
    return "using namespace metal;\n" + "".join(t.text for t in tokens)


def find_misuse(preprocessed: str, constants: Mapping[int, object], lines: Sequence[str], source_name: str) -> list[Finding]:
    """Return one finding for each pointer of the text that changes its address space."""
    text = as_opencl(preprocessed, constants)
    messages = toolchain.cached("spaces.txt", (text,), lambda folder: _check(folder, text)).read_text()
    errors = list(_ERROR.finditer(messages))
    findings = {}
    for error, following in zip(errors, [*errors[1:], None], strict=True):
        whole = messages[error.start() : following.start() if following else len(messages)]
        if error["file"] != source_name or not _mixes_spaces(error["message"], whole):
            continue
        line = int(error["line"])
        message = error["message"]
        for msl, opencl in _SPACES.items():
            message = message.replace(opencl, msl)
        findings.setdefault(
            line, Finding("address space", message, line, lines[line - 1], source_name, (0, 0, 0), (0, 0, 0), 1)
        )
    return list(findings.values())


def _mixes_spaces(message: str, whole: str) -> bool:
    if "no matching" not in message:
        return _names_two_spaces(message)
    candidates = re.findall(r"note: (candidate.*)", whole)  # what each candidate would have needed
    return bool(candidates) and all(map(_names_two_spaces, candidates))


def _names_two_spaces(message: str) -> bool:
    spaces = set(re.findall(r"__(?:global|local|constant|private|generic)", _POINTER_ITSELF.sub(r"\1", message)))
    return len(spaces) > 1 and "__generic" not in spaces


def _check(folder: Path, text: str) -> Path:
    source, result = folder / "kernel.clcpp", folder / "spaces.txt"
    source.write_text(text)
    prelude = toolchain.include_directory() / "metal" / "address_spaces.h"
    language = ("-triple", "spir64-unknown-unknown", "-x", "clcpp", "-cl-std=clc++2021")
    flags = (*language, "-fsyntax-only", "-w", "-ferror-limit", "0", "-include", prelude)
    result.write_text(toolchain.run_frontend((*flags, source)))
    return result
