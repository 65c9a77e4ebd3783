"""Whether two accesses of a block's threads may touch the same bits."""

from __future__ import annotations

import math

import numpy as np
from tvm import arith, ir, tirx
from tvm.tirx.stmt_functor import ir_transform, substitute

from tilelang_ext.passes.accesses import Access, Around, Program, is_opaque, reads_memory
from tilelang_ext.passes.evaluate import Unknown, evaluate
from tilelang_ext.passes.uniformity import int_of

NEXT, LATER = "next round", "a later round"  # of a loop, after an access in it: the one that follows, or any behind that
_MOST_POINTS = 1 << 18  # threads times rounds, or grains of memory, that are counted


def may_meet(program: Program, earlier: Access, carried: dict[Around, str], later: Access) -> bool:
    """Return whether two different threads may touch the same bits, and one of them writes.

    `carried` are the loops whose back edge lies between the two. Accesses by one rule and one set of threads do not meet, if
    each element belongs to one thread.
    """
    if not earlier.array.same_as(later.array) or not (earlier.writes or later.writes) or (earlier.atomic and later.atomic):
        return False
    if earlier.low is None or later.low is None:
        return True
    if _has_one_rule(program, earlier, carried, later):
        return False
    counted = _meet_by_counting(program, earlier, carried, later)
    return _meet_unless_proven(program, earlier, carried, later) if counted is None else counted


def _has_one_rule(program: Program, earlier: Access, carried: dict[Around, str], later: Access) -> bool:
    if earlier.size != later.size or not ir.structural_equal(earlier.low, later.low):
        return False
    used = set(tirx.analysis.undefined_vars(earlier.low))
    reads = reads_memory(earlier.low) or bool(used & program.opaque)
    if carried and (reads or any(loop.loop_var in used for loop in carried)):
        return False
    if len(earlier.around) != len(later.around):
        return False
    for a, b in zip(earlier.around, later.around, strict=True):
        if a is not b and (a.is_loop or b.is_loop or not ir.structural_equal(a.condition, b.condition)):
            return False
    if reads or used & program.threads.keys():
        return not _has_copies(program, earlier)
    return not carried and not later.writes  # all threads write the place, and read what they wrote


def _has_copies(program: Program, access: Access) -> bool:
    """Whether in some round of its loops two threads touch one place by the rule of an access; False if numbers do not tell."""
    loops = [part for part in access.around if part.is_loop and part.loop_var is not None]
    used = _variables(access)
    try:
        rows, threads, _ = _count(program, access, [loop for loop in loops if loop.loop_var in used])
    except Unknown:
        return False
    return len(np.unique(rows, axis=0)) < len(np.unique(np.column_stack([rows, threads]), axis=0))


def _joint_loops(earlier: Access, carried: dict[Around, str], later: Access) -> list[Around]:
    """Return the loops around both accesses whose rounds are one, or follow each other; inside those, rounds are unrelated."""
    joint = []
    for loop in earlier.around:
        if loop not in later.around:
            break
        if loop.is_loop and loop.loop_var is not None:
            joint.append(loop)
        if loop in carried:
            break
    return joint


# --- by all the numbers that occur, if these are few: swizzles are hard to prove --------------------------------------------


def _meet_by_counting(program: Program, earlier: Access, carried: dict[Around, str], later: Access) -> bool | None:
    """Return None where numbers do not tell."""
    used = _variables(earlier) | _variables(later)
    joint = [loop for loop in _joint_loops(earlier, carried, later) if loop.loop_var in used]
    try:
        rows, threads, every = zip(*(_count(program, access, joint) for access in (earlier, later)), strict=True)
    except Unknown:
        return None
    exact = all(every) and LATER not in carried.values()
    grain = math.gcd(earlier.size, later.size, *(int(np.gcd.reduce(row[:, -1], initial=0)) for row in rows))
    places, owners = [], []
    for row, thread, access in zip(rows, threads, (earlier, later), strict=True):
        for column, loop in enumerate(joint):
            if carried.get(loop) == LATER:
                row[:, column] = 0
            elif loop in carried and access is earlier:
                row[:, column] += 1  # the round in which the later access follows
        count = access.size // grain
        if len(row) * count > _MOST_POINTS:
            return None
        grains = np.repeat(row, count, axis=0)
        grains[:, -1] = grains[:, -1] // grain + np.tile(np.arange(count), len(row))
        places.append(grains)
        owners.append(np.repeat(thread, count))
    meet = _have_two_owners(places, owners)
    return None if meet and not exact else meet


def _count(program: Program, access: Access, joint: list[Around]) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return a row (round of each joint loop, first bit) for each time that a thread may come to `access`, the threads, and
    whether they all do come there."""
    ends = dict(program.threads)
    used = _variables(access)
    for part in access.around:
        if part.loop_var is not None and (part.loop_var in used or part in joint):
            begin, extent = int_of(part.begin), int_of(part.extent)
            if begin is None or extent is None:
                raise Unknown
            ends[part.loop_var] = begin + extent
    points = math.prod(ends.values())
    if points > _MOST_POINTS:
        raise Unknown
    grid = np.meshgrid(*map(np.arange, ends.values()), indexing="ij")
    values = {var: axis.reshape(points) for var, axis in zip(ends, grid, strict=True)}
    comes, exact = np.ones(points, bool), True
    for part in access.around:
        if part.loop_var in values:
            comes &= values[part.loop_var] >= int_of(part.begin)
        elif part.condition is not None:
            try:
                comes &= evaluate(part.condition, values)
            except Unknown:
                exact = False
    thread = np.zeros(points, int)
    for var, extent in program.threads.items():
        thread = thread * extent + values[var]
    low = np.broadcast_to(evaluate(access.low, values), points)
    return np.stack([*(values[loop.loop_var] for loop in joint), low], axis=1)[comes], thread[comes], exact


def _variables(access: Access) -> set[tirx.Var]:
    """Return the variables that say where an access goes and whether a thread comes there."""
    exprs = [access.low, *(part.condition for part in access.around if part.condition is not None)]
    return {var for expr in exprs for var in tirx.analysis.undefined_vars(expr)}


def _have_two_owners(places: list[np.ndarray], owners: list[np.ndarray]) -> bool:
    """Return whether some place is touched on both sides, and by more than one thread."""
    _, index = np.unique(np.concatenate(places), axis=0, return_inverse=True)
    sides = np.split(index.reshape(-1), [len(places[0])])
    number = max(int(side.max(initial=-1)) for side in sides) + 1
    lowest, highest = np.full((2, number), np.iinfo(int).max), np.full((2, number), -1)
    for side, (where, threads) in enumerate(zip(sides, owners, strict=True)):
        np.minimum.at(lowest[side], where, threads)
        np.maximum.at(highest[side], where, threads)
    on_both = (highest >= 0).all(0)
    return bool((on_both & (lowest.min(0) != highest.max(0))).any())


# --- by proof ---------------------------------------------------------------------------------------------------------------


def _meet_unless_proven(program: Program, earlier: Access, carried: dict[Around, str], later: Access) -> bool:
    first, second = _Side("first", program), _Side("second", program)
    constraints = []
    for loop in _joint_loops(earlier, carried, later):
        if loop in carried:
            rounds = second.own(loop.loop_var) - first.own(loop.loop_var)
            constraints.append(rounds == 1 if carried[loop] == NEXT else rounds >= 2)
        else:
            first.names[loop.loop_var] = second.names[loop.loop_var] = loop.loop_var
    analyzer = arith.Analyzer()
    different = tirx.const(False, "bool")
    for var, extent in program.threads.items():
        pair = first.own(var), second.own(var)
        for renamed in pair:
            analyzer.bind(renamed, ir.Range(0, extent))
        different = tirx.Or(different, pair[0] != pair[1])
    constraints.append(different)
    for side, access in ((first, earlier), (second, later)):
        for part in access.around:
            if part.loop_var is not None:
                var, begin = side.own(part.loop_var), side.of(part.begin)
                constraints += [var >= begin, var < begin + side.of(part.extent)]
            elif part.condition is not None:
                constraints.append(side.of(part.condition))
    low, other_low = first.of(earlier.low), second.of(later.low)
    return not _proves(analyzer, constraints, tirx.Or(low + earlier.size <= other_low, other_low + later.size <= low))


class _Side:
    """One of two threads: its own copies of the variables that may differ, and of what it reads from memory."""

    def __init__(self, name: str, program: Program):
        self.name = name
        self.names: dict[tirx.Var, tirx.Var] = {}
        self.program = program

    def own(self, var: tirx.Var) -> tirx.Var:
        """Return this thread's copy of a variable."""
        return self.names.setdefault(var, tirx.Var(f"{var.name}_{self.name}", var.dtype))

    def of(self, expr: tirx.PrimExpr) -> tirx.PrimExpr:
        """Return an expression as this thread sees it."""

        def read(node):
            return tirx.Var(f"read_{self.name}", node.dtype) if is_opaque(node) else None

        expr = ir_transform(tirx.Evaluate(expr), read, None, ["tirx.BufferLoad", "tirx.Call"]).value
        for var in tirx.analysis.undefined_vars(expr):
            if var in self.program.opaque:
                self.own(var)
        return substitute(expr, self.names)


def _proves(analyzer: arith.Analyzer, constraints: list[tirx.PrimExpr], claim: tirx.PrimExpr) -> bool:
    if not constraints:
        return analyzer.can_prove(claim)
    with analyzer.constraint_scope(constraints[0]):
        return _proves(analyzer, constraints[1:], claim)
