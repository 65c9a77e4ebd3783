"""Operators that Metal has not: refused by name before anything is lowered, in words that the simulator defines, or ignored."""

from __future__ import annotations

from tilelang_ext.passes.operators import Rule, device_assert, infinity, no_hints, only_to_nearest
from tilelang_ext.passes.plain_words import likely, plain_copies, wide_nextafter

RULES: dict[str, Rule] = {
    "tl.infinity": infinity,
    "tl.device_assert": device_assert,
    "tl.device_assert_with_msg": device_assert,
    "tirx.likely": likely,
    "tirx.nextafter": wide_nextafter,
    **only_to_nearest("Metal"),
    **plain_copies(),
    **no_hints(),
}
