"""Operators that C spells otherwise than the language means them."""

from __future__ import annotations

from tilelang_ext.passes.operators import Rule, away_from_zero, infinity, nearest_even, only_to_nearest

RULES: dict[str, Rule] = {
    "tl.infinity": infinity,
    "tirx.round": nearest_even,
    "tl.round_ties_away_from_zero": away_from_zero,
    **only_to_nearest("target c"),
}
