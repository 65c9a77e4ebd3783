"""Rewrite preprocessed Metal text into C++ that `src/simulator/metal/shim.h` completes.

Only what C++ cannot express is changed, and lines stay where they are:
- address spaces and `kernel` disappear, `constant` is `const`, an unsuffixed literal is a float;
- `threadgroup T a[N];` is a reference into the threadgroup's memory, with or without an initialiser;
- `[[attributes]]` disappear; those of the entry's parameters become the arguments of a generated call;
- function constants get their values; `v.xz` is a call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .errors import CompileError
from .tokens import (
    Token,
    between,
    blank,
    is_attribute,
    matching,
    next_token,
    outside_brackets,
    previous_token,
    significant,
    text_at,
    tokenize,
)

_SWIZZLE = re.compile(r"[xyzw]{2,4}|[rgba]{2,4}")
_COMPONENT = {c: i for i, c in enumerate("xyzw")} | {c: i for i, c in enumerate("rgba")}
_UNSUFFIXED = re.compile(r"(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|0[xX][\da-fA-F]*\.?[\da-fA-F]*[pP][+-]?\d+")
_INSTANTIATION = re.compile(
    r'host_name\((?P<name>(?:\s*"[^"]*")+)\s*\)[^;{]*?(?:decltype\((?P<f>[^;]*?)\)\s*(?P=f)\s*;|\bvoid\s+(?P<g>\w+\s*<[^;{(]*>)\s*\()'
)
_ASSIGNMENTS = {"=", "+=", "-=", "*=", "/="}
_SPACES = {"device", "thread", "threadgroup", "constant"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of the entry: its attribute's name and argument, and how it is declared."""

    name: str
    attribute: str
    index: int | None
    declarator: str  # "*", "&" or ""
    space: str
    is_const: bool


@dataclass(frozen=True)
class Translation:
    """C++ text of one kernel and the parameters of its entry."""

    text: str
    parameters: tuple[Parameter, ...]

    def buffers(self) -> dict[int, Parameter]:
        return {p.index: p for p in self.parameters if p.attribute == "buffer"}


def translate(preprocessed: str, entry: str, constants: Mapping[int, object]) -> Translation:
    """Translate one preprocessed translation unit; `entry` names a kernel, with template arguments or by host_name."""
    tokens = tokenize(preprocessed)
    entry = _resolve_host_name(tokens, entry)
    parameters = _entry_parameters(tokens, entry.partition("<")[0])
    rewrite_declarations(tokens, constants)
    _rewrite_keywords(tokens)
    _drop_repeated_specialisations(tokens)
    _drop_repeated_functions(tokens)
    _rewrite_swizzles(tokens)
    body = "".join(t.text for t in tokens)
    call = ", ".join(_argument(p, constants) for p in parameters)
    text = f'using namespace metal;\n{body}\nextern "C" void sim_kernel() {{ {entry}({call}); }}\n'
    return Translation(text, tuple(parameters))


def rewrite_declarations(tokens: list[Token], constants: Mapping[int, object]) -> None:
    """Rewrite attributes, function constants and threadgroup variables, which no dialect of C++ has."""
    _set_function_constants(tokens, constants)
    _remove_explicit_instantiations(tokens)
    _blank_attributes(tokens)
    _rewrite_threadgroup_variables(tokens)


def _blank_attributes(tokens: list[Token]) -> None:
    i = 0
    while i < len(tokens):
        if is_attribute(tokens, i):
            end = matching(tokens, i)
            blank(tokens, i, end + 1)
            i = end
        i += 1


def _resolve_host_name(tokens: list[Token], entry: str) -> str:
    """Return the kernel that an explicit instantiation names `entry`, if there is one.

    template [[host_name("x")]] [[kernel]] decltype(f<half>) f<half>;
    template [[host_name("x" "_half")]] [[kernel]] void f<half>(device half* y [[buffer(0)]]);
    """
    text = "".join(t.text if t.kind != "newline" else " " for t in tokens) if "<" not in entry else ""
    for found in _INSTANTIATION.finditer(text):
        if "".join(re.findall(r'"([^"]*)"', found["name"])) == entry:
            return (found["f"] or found["g"]).strip()
    return entry


def _remove_explicit_instantiations(tokens: list[Token]) -> None:
    for i, token in enumerate(tokens):
        if token.text == "template" and is_attribute(tokens, min(next_token(tokens, i), len(tokens) - 1)):
            end = next(j for j in range(i, len(tokens)) if tokens[j].text == ";")
            blank(tokens, i, end + 1)


def _find_entry(tokens: list[Token], name: str) -> int:
    """Return the index of the parenthesis that opens the parameters of the definition of kernel `name`."""
    kernels = []
    for i, token in enumerate(tokens):
        if token.text != "kernel" or token.kind != "name":
            continue
        for j in significant(tokens, i):
            if tokens[j].text in (";", "{"):
                break
            function = previous_token(tokens, j)
            if tokens[j].text == "(" and text_at(tokens, previous_token(tokens, function)) == "void":
                kernels.append(tokens[function].text)
                if kernels[-1] == name:
                    return j
                break
    names = ", ".join(dict.fromkeys(kernels)) or "none"
    raise CompileError(f"entry: must name a kernel of the source; got {name!r}; the source defines: {names}")


def _entry_parameters(tokens: list[Token], name: str) -> list[Parameter]:
    start = _find_entry(tokens, name)
    end = matching(tokens, start)
    parameters, piece, depth = [], [], 0
    for j in range(start + 1, end + 1):
        text = tokens[j].text
        if tokens[j].kind == "op":
            depth += (text in "([{<") - (text in ")]}>") if len(text) == 1 else 0
        if j == end or (text == "," and depth == 0):
            if any(t.kind == "name" for t in piece):
                parameters.append(_parameter(piece))
            piece = []
        elif tokens[j].kind not in ("space", "newline"):
            piece.append(tokens[j])
    return _number_buffers(parameters)


def _number_buffers(parameters: list[Parameter]) -> list[Parameter]:
    """Give each buffer without [[buffer(n)]] the smallest index that no other has, in their order."""
    taken, numbered = {p.index for p in parameters if p.attribute == "buffer"}, []
    for p in parameters:
        if p.attribute == "buffer" and p.index is None:
            index = next(i for i in range(len(parameters)) if i not in taken)
            taken.add(index)
            p = replace(p, index=index)
        numbered.append(p)
    return numbered


def _parameter(piece: list[Token]) -> Parameter:
    opening = next((i for i in range(len(piece)) if is_attribute(piece, i)), len(piece))
    declaration = [t.text for t in piece[:opening]]
    if declaration[-1] == "]":  # `constant T name[3]` is a pointer
        bracket = declaration.index("[")
        declaration = [*declaration[: bracket - 1], "*", declaration[bracket - 1]]
    attributes = "".join(t.text for t in piece[opening:]).replace("[[", " ").replace("]]", " ")
    attribute = re.match(r"\s*(\w+)(?:\((\d+)\))?", attributes)
    pointer = next((t for t in reversed(declaration[:-1]) if t in "*&"), "")
    space = next((t for t in declaration if t in _SPACES), "")
    if attribute is None and pointer and space in ("device", "constant"):
        attribute = re.match(r"(\w+)(\d+)?", "buffer")
    if attribute is None:
        raise CompileError(
            f"parameter {declaration[-1]!r}: a kernel's parameter that is no buffer needs an attribute; got none; "
            "write a thread position after its name, or make it `constant T&`"
        )
    index = int(attribute[2]) if attribute[2] else None
    return Parameter(declaration[-1], attribute[1], index, pointer, space, "const" in declaration or space == "constant")


def _argument(p: Parameter, constants: Mapping[int, object]) -> str:
    if p.attribute == "buffer":
        return f"sim::{'ReferenceArgument' if p.declarator == '&' else 'PointerArgument'}{{{p.index}}}"
    return f"sim::{p.attribute}()"


def _set_function_constants(tokens: list[Token], constants: Mapping[int, object]) -> None:
    """Turn `constant bool b [[function_constant(1)]];` into `constant bool b = <value>;`."""
    for i in range(len(tokens)):
        if tokens[i].text != "function_constant" or not is_attribute(tokens, max(i - 2, 0)):
            continue
        end = matching(tokens, i - 2)
        if text_at(tokens, next_token(tokens, end)) != ";":
            continue
        index = int(tokens[next_token(tokens, next_token(tokens, i))].text)
        value = constants.get(index, False)
        blank(tokens, i - 2, end + 1)
        tokens[i].text = f"= {str(value).lower() if isinstance(value, bool) else value}"


def _statement_start(tokens: list[Token], i: int) -> bool:
    """Whether the token at i begins a declaration, apart from alignas(...) and `static`."""
    j = previous_token(tokens, i)
    while text_at(tokens, j) == ")":
        depth = 0
        while True:
            depth += (tokens[j].text == ")") - (tokens[j].text == "(")
            if depth == 0:
                break
            j -= 1
        k = previous_token(tokens, j)
        if text_at(tokens, k) != "alignas":
            return False
        j = previous_token(tokens, k)
    return j < 0 or tokens[j].text.endswith((";", "{", "}"))


def _rewrite_threadgroup_variables(tokens: list[Token]) -> None:
    for i, token in enumerate(tokens):
        if token.text != "threadgroup" or not _statement_start(tokens, i):
            continue
        end = next(j for j in range(i, len(tokens)) if tokens[j].text == ";")
        words = _without_initialisers([tokens[j].text for j in between(tokens, i, end)])
        if "*" in outside_brackets(words) or "&" in outside_brackets(words):
            continue
        if "alignas" in words:
            raise CompileError(
                f"source: alignas must stand before the address space; got `{' '.join(words)}`; write alignas(..) threadgroup"
            )
        start = i
        while text_at(tokens, previous_token(tokens, start)) == ")":  # alignas before the keyword
            start = next(j for j in range(start - 1, -1, -1) if tokens[j].text == "alignas")
            words = [tokens[j].text for j in between(tokens, start, i)] + words
        blank(tokens, start, end + 1)
        tokens[start].text = threadgroup_references(words)


def _without_initialisers(words: list[str]) -> list[str]:
    """Return a declaration without its initialisers: nothing is in the memory of a group before a thread has written it."""
    kept, depth, inside = [], 0, False
    for w in words:
        if depth == 0 and w in ("=", "{"):
            inside = True
        elif depth == 0 and w == ",":
            inside = False
        depth += (w in ("(", "[", "<", "{")) - (w in (")", "]", ">", "}"))
        if not inside:
            kept.append(w)
    return kept


def threadgroup_references(words: list[str]) -> str:
    """Return the references that replace a declaration of arrays in memory that a group shares."""
    align = "0"
    if "alignas" in words:
        at = words.index("alignas")
        close = words.index(")", at)
        align = " ".join(words[at + 2 : close])
        words = words[:at] + words[close + 1 :]
    words = [w for w in words if w not in ("threadgroup", "static", "volatile")]
    declarators, depth = [[]], 0
    for w in words:
        depth += (w in ("(", "[", "<")) - (w in (")", "]", ">"))
        if w == "," and depth == 0:
            declarators.append([])
        else:
            declarators[-1].append(w)
    first = declarators[0]
    name_at = first.index("[") - 1 if "[" in outside_brackets(first) + first[-1:] and "[" in first else len(first) - 1
    base = " ".join(first[:name_at])
    declarators[0] = first[name_at:]
    return "".join(
        f'auto &{d[0]} = sim::threadgroup_alloc<{base}{"".join(d[1:])}, {align}>("{d[0]}", []{{}});' for d in declarators
    )


def _rewrite_keywords(tokens: list[Token]) -> None:
    for i, token in enumerate(tokens):
        if token.kind == "number" and _UNSUFFIXED.fullmatch(token.text):
            token.text += "f"
        if token.kind != "name":
            continue
        if token.text in ("device", "thread", "threadgroup", "kernel"):
            token.text = ""
        elif token.text == "constant":  # after a parameter list it qualifies a member: the unqualified one will do
            token.text = "" if _after_parameters(tokens, i) else "const"
        elif token.text in ("restrict", "__restrict", "__restrict__"):
            token.text = ""  # threads share memory inside one C++ function: nothing is restricted


def _after_parameters(tokens: list[Token], i: int) -> bool:
    j = previous_token(tokens, i)
    while text_at(tokens, j) in ("const", "volatile"):
        j = previous_token(tokens, j)
    return text_at(tokens, j) == ")" and text_at(tokens, next_token(tokens, i)) in ("{", ":", ";", "noexcept")


def _drop_repeated_specialisations(tokens: list[Token]) -> None:
    """Keep the first of `struct s<device T*>` and `struct s<threadgroup T*>`, which are now the same type."""
    seen = set()
    for i, token in enumerate(tokens):
        if token.text not in ("struct", "class"):
            continue
        name = next_token(tokens, i)
        if text_at(tokens, next_token(tokens, name)) != "<" or text_at(tokens, previous_token(tokens, i)) != ">":
            continue
        words, j = [], name
        while text_at(tokens, j) not in ("{", ";", ""):
            words.append(tokens[j].text)
            j = next_token(tokens, j)
        if text_at(tokens, j) != "{":
            continue
        head = next((k for k in range(i, -1, -1) if tokens[k].text == "template"), i)
        key = " ".join([tokens[k].text for k in between(tokens, head, i)] + words)
        if key in seen:
            blank(tokens, head, next_token(tokens, matching(tokens, j)) + 1)
        seen.add(key)


def _drop_repeated_functions(tokens: list[Token]) -> None:
    """Keep the first of `int f(device T*) {..}` and `int f(threadgroup T*) {..}` in a scope: they are now the same overload."""
    scopes = [(set(), len(tokens))]  # signatures seen, and where the scope ends
    head: list[int] = []  # significant tokens of the declaration at hand
    i = next(significant(tokens, 0), len(tokens))
    while i < len(tokens):
        text, end = tokens[i].text, i
        while i >= scopes[-1][1]:
            scopes.pop()
        if text == "{":
            end = matching(tokens, i)
            words = [tokens[k].text for k in head]
            if "namespace" in words[:2] or words[:1] == ["extern"]:
                end = i  # the declarations in it are visited one by one
            elif words and _is_class(words):
                scopes.append((set(), end))
                end = i
            elif "(" in words:
                key = " ".join(_signature(words))
                if key in scopes[-1][0]:
                    blank(tokens, head[0], end + 1)
                scopes[-1][0].add(key)
            head = []
        elif text in ("(", "["):
            end = matching(tokens, i)
            head += between(tokens, i, end + 1)
        elif text.endswith((";", "}")):
            head = []
        else:
            head.append(i)
        i = next_token(tokens, end)


def _is_class(words: list[str]) -> bool:
    """Whether the words before a brace open a class; `template <class T>` alone does not, nor does a function."""
    outside = outside_brackets(words)
    return any(w in ("struct", "class", "union") for w in outside) and outside[-1:] != [")"]


def _signature(words: list[str]) -> list[str]:
    """Return a function's words without its initialisers."""
    depth = 0
    for i, w in enumerate(words):
        depth += (w in ("(", "[", "<")) - (w in (")", "]", ">"))
        if w == ":" and depth == 0 and "(" in words[:i]:
            return words[:i]
    return words


def _rewrite_swizzles(tokens: list[Token]) -> None:
    uses, declared = [], set()
    for i, token in enumerate(tokens):
        if token.kind != "name" or not _SWIZZLE.fullmatch(token.text):
            continue
        if text_at(tokens, previous_token(tokens, i)) in (".", "->"):
            uses.append(i)
        else:
            declared.add(token.text)
    for i in uses:
        text, after = tokens[i].text, text_at(tokens, next_token(tokens, i))
        if text in declared or after == "(":
            continue
        lanes = ", ".join(str(_COMPONENT[c]) for c in text)
        tokens[i].text = f"template swizzle{'_ref' if after in _ASSIGNMENTS else ''}<{lanes}>()"
