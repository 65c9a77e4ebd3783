"""Where the CPU time of a run of the tests went: the tests that took most, and each folder beside its budget.

CPU seconds, of a test and of the compilers that it starts, since seconds by the clock depend on what else the machine does.
"""

import re
import resource
from collections import Counter
from pathlib import Path

import pytest

CONTRIBUTING = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"
_BUDGET = re.compile(r"^\| `testing/(\w+)` .*\| +(\d+) +\|$", re.MULTILINE)
SLOWEST = 20  # tests that are listed
LEAST_SECONDS = 60  # of a run that is worth a table


def seconds() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def budgets() -> dict[str, int]:
    """The CPU seconds of each folder below testing, from the table in CONTRIBUTING.md."""
    return {folder: int(number) for folder, number in _BUDGET.findall(CONTRIBUTING.read_text())}


def lines(taken: Counter) -> list[str]:
    """The table for the CPU seconds that each test took."""
    text = [f"{value:7.1f}  {test}" for test, value in taken.most_common(SLOWEST)]
    folders = Counter()
    for test, value in taken.items():
        path = Path(test.partition("::")[0]).parts
        folders[path[1] if len(path) > 2 else "."] += value
    allowed = budgets()
    text += ["", "CPU seconds, budget, folder"]
    for folder, value in folders.most_common():
        budget = allowed.get(folder)
        over = "  over: see CONTRIBUTING.md" if budget is not None and value > budget else ""
        text.append(f"{value:7.0f}  {'-' if budget is None else budget:>5}  testing/{folder}{over}")
    return [*text, f"{folders.total():7.0f}  {sum(allowed.values()):5}  in all"]


class CpuTime:
    """Measures each test where it runs, and adds up where the reports arrive."""

    def __init__(self):
        self.start = 0.0
        self.taken = Counter()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self):
        self.start = seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        report.cpu_seconds = seconds() - self.start
        return report

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":
            self.taken[report.nodeid] = report.cpu_seconds

    def pytest_terminal_summary(self, terminalreporter):
        if self.taken.total() > LEAST_SECONDS:
            terminalreporter.section(f"the {SLOWEST} tests that took most CPU seconds")
            terminalreporter.write_line("\n".join(lines(self.taken)))
