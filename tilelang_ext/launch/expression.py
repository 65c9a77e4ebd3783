"""Integer expressions over the facts of a call, as a plan's recipe has them: data that the native launcher compiles.

A recipe is an integer, a fact about an argument, or an operator with its operands, as lists that JSON can hold:

    4096                                      a constant
    ["shape", "x", 0], ["stride", "x", 1]     of a tensor; strides in elements; -1 for a dimension that it lacks
    ["rank", "x"], ["dtype", "x"], ["device", "x"], ["address", "x"]     -1 for None
    ["present", "x"]                          1 for a tensor, 0 for None
    ["value", "n"]                            an integer argument; the bits of a float, the digest of a str
    ["//", ["+", ["shape", "x", 0], 63], 64]  an operator of `OPERATORS`; // and % round as Python's do

`Expression` writes them with Python's operators; what is known at once is an int, so that code for sizes serves both. They
mean what src/launch/expression.cc computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Recipe = int | list
FACTS = ("shape", "stride", "rank", "dtype", "device", "address", "present", "value")


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


OPERATORS: dict[str, Callable[..., int]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "//": lambda x, y: x // y,
    "%": lambda x, y: x % y,
    "min": min,
    "max": max,
    "==": lambda x, y: int(x == y),
    "!=": lambda x, y: int(x != y),
    "<": lambda x, y: int(x < y),
    "<=": lambda x, y: int(x <= y),
    "and": lambda x, y: int(x != 0 and y != 0),
    "or": lambda x, y: int(x != 0 or y != 0),
    "not": lambda x: int(x == 0),
    "select": lambda condition, then, otherwise: then if condition else otherwise,
    "power_of_two": _power_of_two,  # the least that is not less
}


class Expression:
    """An integer that a call of a plan gives. Comparisons give 1 or 0, as expressions too."""

    __slots__ = ("recipe",)
    __hash__ = None

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def __add__(self, other) -> Expression:
        return apply("+", self, other)

    def __radd__(self, other) -> Expression:
        return apply("+", other, self)

    def __sub__(self, other) -> Expression:
        return apply("-", self, other)

    def __rsub__(self, other) -> Expression:
        return apply("-", other, self)

    def __mul__(self, other) -> Expression:
        return apply("*", self, other)

    __rmul__ = __mul__

    def __neg__(self) -> Expression:
        return apply("-", 0, self)

    def __floordiv__(self, other) -> Expression:
        return apply("//", self, other)

    def __mod__(self, other) -> Expression:
        return apply("%", self, other)

    def __eq__(self, other) -> Expression:
        return apply("==", self, other)

    def __ne__(self, other) -> Expression:
        return apply("!=", self, other)

    def __lt__(self, other) -> Expression:
        return apply("<", self, other)

    def __le__(self, other) -> Expression:
        return apply("<=", self, other)

    def __bool__(self) -> bool:
        raise TypeError(
            "expression: must not be a condition of Python's, since its value is known in a call; got one; use select"
        )

    def __repr__(self) -> str:
        return f"Expression({self.recipe})"


def recipe_of(value: Expression | int | list) -> Recipe:
    """Return an integer's, an expression's or a recipe's recipe."""
    if isinstance(value, Expression):
        return value.recipe
    return value if isinstance(value, list) else int(value)


def apply(operator: str, *operands) -> Expression | int:
    """Return an operator of operands; an int where all are known. 0 and 1 drop out of sums, products and quotients."""
    recipes = [recipe_of(operand) for operand in operands]
    if all(isinstance(recipe, int) for recipe in recipes):
        return OPERATORS[operator](*recipes)
    neutral = {"+": 0, "-": 0, "*": 1, "//": 1}.get(operator)
    if neutral is not None and recipes[1] == neutral:
        return Expression(recipes[0])
    if operator in ("+", "*") and recipes[0] == neutral:
        return Expression(recipes[1])
    return Expression([operator, *recipes])


def shape(name: str, dimension: int) -> Expression:
    return Expression(["shape", name, dimension])


def stride(name: str, dimension: int) -> Expression:
    return Expression(["stride", name, dimension])


def fact(kind: str, name: str) -> Expression:
    """Return one of `FACTS` about an argument as a whole, as fact("dtype", "x")."""
    return Expression([kind, name])


def ceildiv(value, divisor) -> Expression | int:
    return apply("//", apply("+", value, apply("-", divisor, 1)), divisor)


def maximum(left, right) -> Expression | int:
    return apply("max", left, right)


def minimum(left, right) -> Expression | int:
    return apply("min", left, right)


def select(condition, then, otherwise) -> Expression | int:
    """Return `then` where the condition is not 0, else `otherwise`; both are computed."""
    return apply("select", condition, then, otherwise)


def power_of_two(value) -> Expression | int:
    """Return the least power of two that is not less."""
    return apply("power_of_two", value)


def contiguous_strides(extents: Sequence[Expression | int]) -> list[Expression | int]:
    """Return the strides of a contiguous tensor, in elements."""
    strides: list[Expression | int] = [1] * len(extents)
    for i in reversed(range(len(extents) - 1)):
        strides[i] = strides[i + 1] * extents[i + 1]
    return strides


def evaluate(recipe: Recipe | Expression, facts: Callable[..., int]) -> int:
    """Return the value of a recipe, with facts(kind, name, dimension if it has one)."""
    recipe = recipe_of(recipe)
    if isinstance(recipe, int):
        return recipe
    head, *rest = recipe
    if head in FACTS:
        return facts(head, *rest)
    return OPERATORS[head](*(evaluate(operand, facts) for operand in rest))


def substitute(recipe: Recipe | Expression, replace: Callable[[list], Expression | int]) -> Expression | int:
    """Return a recipe's value with `replace` of each fact in its place."""
    recipe = recipe_of(recipe)
    if isinstance(recipe, int):
        return recipe
    head, *rest = recipe
    if head in FACTS:
        return replace(recipe)
    return apply(head, *(substitute(operand, replace) for operand in rest))
