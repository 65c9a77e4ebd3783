"""Tokens of preprocessed Metal or HIP text, and ways to walk and blank them without losing lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import CompileError

_TOKEN = re.compile(
    r"""(?P<newline>\n\#[^\n]*|\n)|(?P<space>[ \t\r\f\v]+)|(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    |(?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)|(?P<name>[A-Za-z_]\w*)|(?P<op>::|->|<<=|>>=|[-+*/%&|^=!<>]=|&&|\|\||.)""",
    re.VERBOSE,
)
_OPEN, _CLOSE = "([{", ")]}"


@dataclass
class Token:
    kind: str
    text: str


def tokenize(text: str) -> list[Token]:
    """All tokens, including white space and line markers; joined, they are the text again, after one newline."""
    return [Token(m.lastgroup, m.group()) for m in _TOKEN.finditer("\n" + text)]


def significant(tokens: list[Token], start: int, step: int = 1) -> Iterator[int]:
    i = start
    while 0 <= i < len(tokens):
        if tokens[i].kind not in ("space", "newline") and tokens[i].text:
            yield i
        i += step


def between(tokens: list[Token], start: int, end: int) -> list[int]:
    """Indices in [start, end) of tokens that are neither white space nor blank."""
    return [i for i in range(start, end) if tokens[i].kind not in ("space", "newline") and tokens[i].text]


def next_token(tokens: list[Token], i: int) -> int:
    return next(significant(tokens, i + 1), len(tokens))


def previous_token(tokens: list[Token], i: int) -> int:
    return next(significant(tokens, i - 1, -1), -1)


def text_at(tokens: list[Token], i: int) -> str:
    return tokens[i].text if 0 <= i < len(tokens) else ""


def matching(tokens: list[Token], i: int) -> int:
    """Index of the bracket that closes the one at i."""
    depth = 0
    for j in range(i, len(tokens)):
        text = tokens[j].text
        if tokens[j].kind != "op" or not text:
            continue
        if text in _OPEN:
            depth += 1
        elif text in _CLOSE:
            depth -= 1
            if depth == 0:
                return j
    raise CompileError("source: brackets must match; got one that is never closed; check the kernel's text")


def blank(tokens: list[Token], start: int, end: int) -> None:
    """Remove the text of [start, end) but keep its newlines."""
    for t in tokens[start:end]:
        if t.kind != "newline":
            t.text = ""


def is_attribute(tokens: list[Token], i: int) -> bool:
    return tokens[i].text == "[" and i + 1 < len(tokens) and tokens[i + 1].text == "["


def outside_brackets(words: list[str]) -> list[str]:
    depth, outside = 0, []
    for w in words:
        depth -= w in (")", "]", ">")
        if depth == 0:
            outside.append(w)
        depth += w in ("(", "[", "<")
    return outside
