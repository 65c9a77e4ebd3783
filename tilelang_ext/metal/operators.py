"""Operators that Metal has not, refused by name before anything is lowered."""

from __future__ import annotations

from tilelang_ext.passes.operators import Rule, infinity, only_to_nearest

RULES: dict[str, Rule] = {"tl.infinity": infinity, **only_to_nearest("Metal")}
