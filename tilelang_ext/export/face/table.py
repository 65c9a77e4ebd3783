"""The variants that were exported, and the plan that they are added to when a call first needs them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from tilelang_ext.launch.plan import Plan, launcher

FOLDER = Path(__file__).resolve().parents[2]  # of the exported package


@functools.cache
def read(operator: str) -> dict:
    """Return what was exported of an operator: its recipe, its variants. Raises NotImplementedError if it was not."""
    path = FOLDER / "operators" / f"{operator}.json"
    if not path.is_file():
        raise NotImplementedError(
            f"{operator}: must have been exported; got a folder without it; export it with --ops {operator}"
        )
    return json.loads(path.read_text())


def exported() -> dict[str, list[str]]:
    """Return what was exported of each operator, a line for each range of sizes."""
    return {
        path.stem: [each["what"] for each in read(path.stem)["variants"]] for path in sorted(FOLDER.glob("operators/*.json"))
    }


def device_name(number: int) -> str:
    return f"cuda:{number}"


class Table:
    """The exported variants of one operator."""

    def __init__(self, operator: str, members: Mapping | None = None):
        self.operator, self.members = operator, members

    @functools.cached_property
    def plan(self) -> Plan:
        """The plan of this process, with the variants that calls have needed so far."""
        return launcher().plan(read(self.operator)["recipe"], self.members)

    @functools.cached_property
    def launch_directly(self) -> Callable[..., bool]:
        return self.plan.launch_directly

    def launch(self, *arguments) -> None:
        """Launch; a variant that the plan lacks is read first. Raises NotImplementedError where none was exported."""
        if self.plan.launch(*arguments):
            return
        key, size = self.plan.key(*arguments)
        parts = self.plan.recipe["key"]
        device = parts.index(next(part for part in parts if isinstance(part, list) and part[0] == "device"))
        # A variant serves every device of its architecture: it was exported without a number of one.
        wanted = [*key[:device], *key[device + 1 :]]
        for each in read(self.operator)["variants"]:
            recipe = each["recipe"]
            first, last = recipe["sizes"]
            if [*recipe["key"][:device], *recipe["key"][device + 1 :]] == wanted and first <= size <= last:
                self._add({**recipe, "key": key}, each, key[device])
                return self.plan(*arguments)
        raise NotImplementedError(
            f"{self.operator}: kernels must have been exported for these sizes, dtypes and options; got key {key} and "
            f"size {size}; see exported(), and export again with them"
        )

    def _add(self, recipe: dict, each: dict, device: int) -> None:
        if each["constants"] and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self.operator}: its first call of these sizes must not be captured in a graph; got a capture; call it "
                "once before"
            )
        cubins = [(FOLDER / "cubins" / name).read_bytes() for name in each["cubins"]]
        constants = [
            torch.tensor(constant["values"], dtype=getattr(torch, constant["dtype"])).to(device_name(device))
            for constant in each["constants"]
        ]
        self.plan.add(recipe, cubins, constants)
