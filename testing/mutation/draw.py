"""Single-point mutants of a file: each changes one operator, constant, statement or pair of arguments, in the text itself.

Python is changed where its syntax tree says, and nothing in it that no test should notice: docstrings, annotations, imports and
the words of an error are left alone. C++, and the Metal text within it, is changed by patterns that take the spaces of
clang-format for granted.
"""

import ast
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """`text[start:end]` of the file at `path`, below the root, becomes `replacement`."""

    path: str
    kind: str
    start: int
    end: int
    replacement: str

    def apply(self, text: str) -> str:
        return text[: self.start] + self.replacement + text[self.end :]

    def lines(self, text: str) -> tuple[int, str, str]:
        """The number of the first changed line, and the changed lines before and after, without their indentation."""
        first = text.rfind("\n", 0, self.start) + 1
        last = text.find("\n", self.end) % (len(text) + 1)
        before, after = text[first:last], text[first : self.start] + self.replacement + text[self.end : last]
        return text.count("\n", 0, first) + 1, _one_line(before), _one_line(after)


def _one_line(text: str) -> str:
    return " ".join(text.split())


_COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
}  # fmt: skip
_OPERATORS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "//", ast.FloorDiv: "*", ast.Mod: "//", ast.Div: "*",
    ast.LShift: ">>", ast.RShift: "<<", ast.BitAnd: "|", ast.BitOr: "&",
}  # fmt: skip

# Their arguments have no order that counts, or none but one that Python takes.
_NO_ORDER = {"getattr", "hasattr", "isinstance", "issubclass", "max", "min", "zip"}


class _Python(ast.NodeVisitor):
    def __init__(self, path: str, text: str):
        self.path, self.text, self.found = path, text, []
        # Columns of the tree count bytes of UTF-8.
        self.bytes = text.encode()
        self.starts = [0]
        for line in self.bytes.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def at(self, line: int, column: int) -> int:
        return len(self.bytes[: self.starts[line - 1] + column].decode())

    def span(self, node) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def add(self, kind: str, start: int, end: int, replacement: str) -> None:
        self.found.append(Mutant(self.path, kind, start, end, replacement))

    def between(self, kind: str, left, right, replacement: str) -> None:
        """Replace the operator between two operands; brackets and line ends around it stay."""
        start, end = self.span(left)[1], self.span(right)[0]
        match = re.search(r"(?:not\s+in|is\s+not|\w+|[-+*/%<>=!&|]+)", self.text[start:end])
        if match:
            self.add(kind, start + match.start(), start + match.end(), replacement)

    def drop(self, node) -> None:
        self.add("dropped statement", *self.span(node), "pass")

    def visit_Compare(self, node):
        for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            self.between("comparison", left, right, _COMPARISONS[type(operator)])
        self.generic_visit(node)

    def visit_BinOp(self, node):
        if type(node.op) in _OPERATORS:
            self.between("operator", node.left, node.right, _OPERATORS[type(node.op)])
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between("and, or", left, right, "or" if isinstance(node.op, ast.And) else "and")
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.Not):
            self.add("not", self.span(node)[0], self.span(node.operand)[0], "")
        self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, bool):
            self.add("constant", *self.span(node), str(not node.value))
        elif isinstance(node.value, int):
            self.add("constant", *self.span(node), str(node.value + 1))

    def visit_Call(self, node):
        plain = len(node.args) >= 2 and not any(isinstance(argument, ast.Starred) for argument in node.args[:2])
        plain = plain and getattr(node.func, "id", "") not in _NO_ORDER
        if plain and ast.dump(node.args[0]) != ast.dump(node.args[1]):
            (start, first), (second, end) = self.span(node.args[0]), self.span(node.args[1])
            swapped = self.text[second:end] + self.text[first:second] + self.text[start:first]
            self.add("swapped arguments", start, end, swapped)
        self.generic_visit(node)

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Call):
            self.drop(node)
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.generic_visit(node)

    def visit_AugAssign(self, node):
        self.drop(node)
        self.generic_visit(node)

    def visit_Raise(self, node):
        self.drop(node)

    def visit_Assert(self, node):
        self.drop(node)

    def visit_FunctionDef(self, node):
        for statement in (*node.args.defaults, *node.args.kw_defaults, *node.body):
            if statement is not None:
                self.visit(statement)

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.visit(node.value)

    def visit_If(self, node):
        if getattr(node.test, "id", "") != "TYPE_CHECKING":
            self.generic_visit(node)

    def visit_JoinedStr(self, node):
        pass

    def visit_Import(self, node):
        pass

    visit_ImportFrom = visit_Import


_CPP = (
    ("comparison", r" (<|<=|>|>=|==|!=) ", {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}),
    ("operator", r" (\+|-|\*|/|%|<<|>>|\+=|-=) ", {"+": "-", "-": "+", "*": "/", "/": "*", "%": "/", "+=": "-=", "-=": "+="}),
    ("and, or", r" (&&|\|\|) ", {"&&": "||", "||": "&&"}),
    ("not", r"(?<=[( ])(!)(?=\w)", {"!": ""}),
    ("constant", r"(?<![\w.$@\"])(\d+)(?![\w.$\"])", None),
    ("dropped statement", r"(?m)^ +((?!return|using|else|if |for |case |while )\w[\w:.>\[\]()* -]+\([^;\n]*\);)$", ""),
    ("dropped statement", r"(?m)^ +([\w.\[\]>-]+ (?:=|\+=|\|=|-=) [^;\n]*;)$", ""),
    ("dropped table row", r"(?m)^ +(\{\"[^\n]*\},)$", ""),
    ("swapped arguments", r"(?<=\w\()([\w.]+, [\w.]+)(?=[,)])", "swap"),
)
_RAW = re.compile(r'R"(\w*)\((.*?)\)\1"', re.DOTALL)
_SILENT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'', re.DOTALL)


def _blank(text: str, keep: str = " ") -> str:
    return re.sub(r"[^\n]", keep, text)


def _code(text: str) -> str:
    """C++ of the same length, whose comments are blank and whose strings are empty; raw strings, which hold code, stay."""
    parts, last = [], 0
    for raw in [*_RAW.finditer(text), None]:
        end = raw.start() if raw else len(text)
        parts.append(_SILENT.sub(_silenced, text[last:end]))
        if raw:
            parts.append(_SILENT.sub(_silenced, raw[0].replace('"', "_")))
            last = raw.end()
    return "".join(parts)


def _silenced(match: re.Match) -> str:
    text = match[0]
    return f'"{_blank(text[1:-1], "_")}"' if text[0] == '"' else _blank(text)


def _cpp(path: str, text: str) -> Iterator[Mutant]:
    code = _code(text)
    for kind, pattern, table in _CPP:
        for match in re.finditer(pattern, code):
            line = code[code.rfind("\n", 0, match.start(1)) + 1 :]
            if line.lstrip().startswith(("#", "template", "static_assert", "TVM_FFI_THROW", "throw")):
                continue
            old = text[match.start(1) : match.end(1)]
            if table is None:
                replacement = str(int(old) + 1)
            elif table == "swap":
                first, second = old.split(", ")
                if first == second or (first[0].isdigit() and second[0].isdigit()):
                    continue
                replacement = f"{second}, {first}"
            elif isinstance(table, dict):
                if (replacement := table.get(old)) is None:  # shifts, most of which write to a stream
                    continue
            else:
                replacement = table
            yield Mutant(path, kind, match.start(1), match.end(1), replacement)


def mutants_of(path: str, text: str) -> list[Mutant]:
    """Every mutant of one file, in the order of the text."""
    if path.endswith(".py"):
        visitor = _Python(path, text)
        visitor.visit(ast.parse(text))
        found = visitor.found
    else:
        found = list(_cpp(path, text))
    return sorted(found, key=lambda mutant: (mutant.start, mutant.end, mutant.replacement))


def draw(root: Path, paths: Iterable[str], seed: int) -> Iterator[Mutant]:
    """Mutants in a random order that depends on the seed alone, a file after the other, until there are none left."""
    chance = random.Random(seed)
    decks = []
    for path in sorted(paths):
        deck = mutants_of(path, (root / path).read_text())
        random.Random(f"{seed} {path}").shuffle(deck)
        decks.append(deck)
    chance.shuffle(decks)
    while decks := [deck for deck in decks if deck]:
        for deck in decks:
            yield deck.pop()
