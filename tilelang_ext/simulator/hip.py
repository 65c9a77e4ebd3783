"""Rewrite preprocessed HIP text into C++ that `src/simulator/hip/shim.h` completes; the table of simulated architectures.

Only what C++ cannot express is changed, and lines stay where they are:
- `__shared__ T a[N];` is a reference into the group's LDS, `extern __shared__ T a[];` a pointer to what the launch adds;
- `asm volatile("s_waitcnt ..." : : inputs)` is a call of `asm_s_waitcnt(inputs)`;
- `__global__` disappears, and the entry's parameters become the arguments of a generated call;
- functions of included headers are inlined without lines of their own: a fault there is reported at the line that calls them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import CompileError
from .msl import threadgroup_references
from .tokens import Token, between, blank, matching, next_token, previous_token, text_at, tokenize
from .toolchain import Dialect

# Standard, HIP and rocWMMA headers that TileLang's templates include: the shim has what they use of them.
_HEADERS = (
    "hip/hip_runtime.h", "hip/hip_fp16.h", "hip/hip_bf16.h", "hip/hip_bfloat16.h", "hip/amd_detail/amd_hip_fp8.h",
    "hip/amd_detail/amd_warp_functions.h", "rocwmma/rocwmma.hpp", "stdint.h", "cstdint", "type_traits", "math.h", "cmath",
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """An AMD GPU as its ISA guide describes it: lanes per wave, bytes of LDS per work-group."""

    name: str
    wave: int
    lds: int

    @property
    def dialect(self) -> Dialect:
        defines = (
            f"-D__{self.name}__=1",
            "-D__HIP_PLATFORM_AMD__=1",
            "-D__HIP_DEVICE_COMPILE__=1",
            "-D__HIPCC__=1",
            "-D__AMDGCN__=1",
        )
        flags = ("-fdeclspec", f"-DSIM_LANES={self.wave}", f"-DSIM_ARCHITECTURE=0x{self.name.removeprefix('gfx')}")
        return Dialect("hip", "kernel.hip", _HEADERS, defines, flags)


ARCHITECTURES = {
    name: Architecture(name, wave, lds << 10)
    for name, wave, lds in (
        ("gfx90a", 64, 64),
        ("gfx940", 64, 64),
        ("gfx941", 64, 64),
        ("gfx942", 64, 64),
        ("gfx950", 64, 160),
        ("gfx1100", 32, 64),
        ("gfx1101", 32, 64),
        ("gfx1102", 32, 64),
        ("gfx1103", 32, 64),
        ("gfx1150", 32, 64),
        ("gfx1151", 32, 64),
        ("gfx1200", 32, 64),
        ("gfx1201", 32, 64),
    )
}


def find_architecture(name: str) -> Architecture:
    """Return the architecture of this name, such as "gfx942"; ValueError for one that is not simulated."""
    if name not in ARCHITECTURES:
        raise ValueError(f"arch: must be one of {', '.join(ARCHITECTURES)}; got {name!r}; pass one of these")
    return ARCHITECTURES[name]


@dataclass(frozen=True)
class Parameter:
    """One parameter of the entry."""

    name: str
    is_pointer: bool
    is_const: bool


@dataclass(frozen=True)
class Translation:
    """C++ text of one kernel and the parameters of its entry."""

    text: str
    parameters: tuple[Parameter, ...]


def translate(preprocessed: str, entry: str, source_name: str) -> Translation:
    """Translate one preprocessed text; `entry` names its `__global__` function."""
    tokens = tokenize(preprocessed)
    parameters = _entry_parameters(tokens, entry)
    _rewrite_shared_variables(tokens)
    _rewrite_assembly(tokens)
    for token in tokens:
        if token.text == "__global__":
            token.text = ""
    body = _inline_headers("".join(t.text for t in tokens), source_name)
    call = ", ".join(f"sim::{'Pointer' if p.is_pointer else 'Scalar'}Argument{{{i}}}" for i, p in enumerate(parameters))
    return Translation(f'{body}\nextern "C" void sim_kernel() {{ sim::begin_thread(); {entry}({call}); }}\n', parameters)


def _entry_parameters(tokens: list[Token], name: str) -> tuple[Parameter, ...]:
    kernels = []
    for i, token in enumerate(tokens):
        if token.text != "__global__":
            continue
        j = i
        while text_at(tokens, j) not in ("{", ";", ""):
            function = j
            j = next_token(tokens, j)
            if text_at(tokens, j) != "(":
                continue
            if tokens[function].text == name:
                return _parameters(tokens, j)
            kernels.append(tokens[function].text)
            j = matching(tokens, j)
    names = ", ".join(k for k in dict.fromkeys(kernels) if not k.startswith("__")) or "none"
    raise CompileError(f"entry: must name a kernel of the source; got {name!r}; the source defines: {names}")


def _parameters(tokens: list[Token], opening: int) -> tuple[Parameter, ...]:
    pieces, depth = [[]], 0
    for j in between(tokens, opening + 1, matching(tokens, opening)):
        text = tokens[j].text
        depth += (text in ("(", "[", "<", "{")) - (text in (")", "]", ">", "}"))
        if text == "," and depth == 0:
            pieces.append([])
        else:
            pieces[-1].append(text)
    return tuple(Parameter(p[-1], "*" in p, "const" in p) for p in pieces if p)


def _rewrite_shared_variables(tokens: list[Token]) -> None:
    for i, token in enumerate(tokens):
        if token.text != "__shared__":
            continue
        end = next(j for j in range(i, len(tokens)) if tokens[j].text == ";")
        dynamic = text_at(tokens, previous_token(tokens, i)) == "extern"
        start = previous_token(tokens, i) if dynamic else i
        words = [tokens[j].text for j in between(tokens, i + 1, end)]
        align, words = _take_alignment(words)
        blank(tokens, start, end + 1)
        if dynamic:
            name = words[words.index("[") - 1]
            base = " ".join(words[: words.index(name)])
            tokens[start].text = f'{base}* const {name} = sim::dynamic_shared<{base}, {align}>("{name}", []{{}});'
        else:
            tokens[start].text = threadgroup_references(["alignas", "(", align, ")", *words])


def _take_alignment(words: list[str]) -> tuple[str, list[str]]:
    """Return the alignment that `__align__(n)` or `alignas(n)` gives, and the words without it."""
    for i, word in enumerate(words):
        if word in ("__align__", "alignas"):
            close = words.index(")", i)
            return " ".join(words[i + 2 : close]), words[:i] + words[close + 1 :]
    return "1", words


def _rewrite_assembly(tokens: list[Token]) -> None:
    """Make a statement of inline assembly without outputs a call of the function that its mnemonics name."""
    for i, token in enumerate(tokens):
        if token.text not in ("asm", "__asm__", "__asm"):
            continue
        opening = next_token(tokens, i)
        while text_at(tokens, opening) in ("volatile", "__volatile__"):
            opening = next_token(tokens, opening)
        end = matching(tokens, opening)
        parts, depth = [[]], 0
        for j in between(tokens, opening + 1, end):
            text = tokens[j].text
            depth += (text in ("(", "[")) - (text in (")", "]"))
            if depth == 0 and text in (":", "::"):
                parts += [[] for _ in text]
            else:
                parts[-1].append(text)
        template = "".join(w[1:-1] for w in parts[0])
        template = re.sub(r"s_waitcnt\s+(\w+)", r"s_waitcnt_\1", template)
        mnemonics = re.findall(r"(?:^|\\n|;)[\s;]*(?:\\t|\\n|\s)*([a-z]\w*)", template)
        if len(parts) > 1 and parts[1]:
            raise CompileError(
                f"source: inline assembly with outputs is not simulated; got `{template}`; use a builtin for these instructions"
            )
        inputs = _assembly_operands(parts[2]) if len(parts) > 2 else []
        blank(tokens, i, end + 1)
        tokens[i].text = f"sim::asm_{'_'.join(mnemonics)}({', '.join(inputs)})"


def _assembly_operands(words: list[str]) -> list[str]:
    """Return the expressions in parentheses of `"s"(a), "v"(b)`."""
    operands, depth = [], 0
    for word in words:
        if word == ")":
            depth -= 1
            if depth == 0:
                continue
        if depth:
            operands[-1] += f" {word}"
        if word == "(":
            if depth == 0:
                operands.append("")
            depth += 1
    return [operand.strip() for operand in operands]


_MARKER = re.compile(r'\n# \d+ "(?P<file>[^"\n]*)"[^\n]*')
_PUSH = (
    "\n#pragma clang attribute push(__attribute__((always_inline)), apply_to = function)"
    "\n#pragma clang attribute push(__attribute__((nodebug)), apply_to = hasType(functionType))"
)
_POP = 2 * "\n#pragma clang attribute pop"


def _inline_headers(text: str, source_name: str) -> str:
    """Put attributes around the parts that come from included files."""
    out, at, inside = [], 0, False
    for marker in _MARKER.finditer(text):
        foreign = marker["file"] != source_name and not marker["file"].startswith("<")
        if foreign == inside:
            continue
        out += [text[at : marker.start()], _PUSH if foreign else _POP]
        at, inside = marker.start(), foreign
    return "".join(out) + text[at:] + (_POP if inside else "")
