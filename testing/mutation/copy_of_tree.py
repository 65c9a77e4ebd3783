"""A temporary copy of the checkout, in which a mutant is built and tested in a process of its own."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = {"src/metal": "tilelang_ext", "src/launch": "tilelang_ext_launch"}
HANGS = 60  # seconds after which a single test is taken to hang


@dataclass(frozen=True)
class Outcome:
    """`status`: passed, failed, stopped (out of time), hangs or no tests; `test`: the one that failed or hangs."""

    status: str
    test: str = ""
    message: str = ""


class _FirstFailure:
    """Writes the test that runs, and the first failure, where the parent process reads them."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, **what) -> None:
        self.path.write_text(json.dumps(what))

    def pytest_runtest_logstart(self, nodeid):
        self.write(running=nodeid, since=time.time())

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.write(failed=report.nodeid, message=report.longreprtext[-4000:])

    def pytest_collectreport(self, report):
        if report.failed:
            self.write(failed=report.nodeid, message=report.longreprtext[-4000:])


class Copy:
    """The files that git knows or would add, and the native libraries."""

    def __init__(self, root: Path, folder: Path):
        self.root, self.folder = root, folder
        self.caches = folder.parent / "caches"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, check=True, capture_output=True
        ).stdout.decode()
        for name in filter(None, listed.split("\0")):
            if (root / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, folder / name)
        self.libraries = folder.parent / "lib"  # as they are without a mutant
        for copied in (self.libraries, folder / "tilelang_ext" / "lib"):
            shutil.copytree(root / "tilelang_ext" / "lib", copied)
        (folder / ".venv").symlink_to(Path(sys.prefix))

    def write(self, path: str, text: str) -> None:
        (self.folder / path).write_text(text)

    def build(self, path: str, text: str) -> bool:
        """Compile one changed file of C++ and link its library; False if the compiler refuses the text."""
        self.write(path, text)
        library = LIBRARIES.get(str(Path(path).parent))
        if library is None:
            return True
        build = Path(sys.prefix) / "build"
        listed = subprocess.run(
            [Path(sys.prefix) / "bin" / "ninja", "-C", build, "-t", "commands", library],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        *compiles, link = [line for line in listed.splitlines() if "-o " in line]
        command = [line for line in compiles if line.endswith(f"{self.root / path}")]
        if not command:
            raise SystemExit(
                f"FILES: must be .cc files that .venv/build compiles one by one; got {path}; "
                "remove .venv/build and run make venv without a unity build"
            )
        made = self.folder.parent / "mutant.o"
        words = shlex.split(command[0])
        (old,) = [words[i + 1] for i, word in enumerate(words) if word == "-o"]
        words = [str(made) if word == old else word.replace(f"{self.root}/src", f"{self.folder}/src") for word in words]
        if subprocess.run(words, cwd=build, capture_output=True).returncode:
            return False
        (target,) = re.findall(r" -o (\S+\.(?:so|dylib))", link)
        link = link.replace(f" {old} ", f" {made} ").replace(f" -o {target}", f" -o {self._library(target, build)}")
        subprocess.run(link, cwd=build, shell=True, check=True, capture_output=True)
        return True

    def _library(self, target: str, build: Path) -> Path:
        """Where the copy has the library that the build has at `target`, free for a new file."""
        path = self.folder / (build / target).resolve().relative_to(self.root)
        path.unlink(missing_ok=True)
        return path

    def restore(self, path: str, text: str) -> None:
        """Bring back the file, and the libraries if it is one of theirs."""
        self.write(path, text)
        if str(Path(path).parent) in LIBRARIES:
            shutil.rmtree(self.folder / "tilelang_ext" / "lib")
            shutil.copytree(self.libraries, self.folder / "tilelang_ext" / "lib")

    def run(self, tests: list[str], seconds: float) -> Outcome:
        """Run the tests until one fails, in a fork of this process, which has imported what takes time."""
        report = self.folder.parent / "report.json"
        report.unlink(missing_ok=True)
        shutil.rmtree(self.caches, ignore_errors=True)
        start = time.time()
        child = os.fork()
        if child == 0:
            os._exit(self._child(tests, report))
        while time.time() < start + seconds:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                found = json.loads(report.read_text()) if report.exists() else {}
                if "failed" in found:
                    return Outcome("failed", found["failed"], found["message"])
                code = os.waitstatus_to_exitcode(status)
                if code in (0, 5):
                    return Outcome("passed" if found else "no tests")
                return Outcome("failed", found.get("running", tests[0]), f"the process ended with {code}")  # or did not import
            found = _read(report)
            if time.time() > found.get("since", start) + HANGS:
                break
            time.sleep(0.05)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = _read(report)
        hangs = time.time() > found.get("since", start) + HANGS
        return Outcome("hangs" if hangs else "stopped", found.get("running", ""))

    def _child(self, tests: list[str], report: Path) -> int:
        import pytest

        os.setsid()
        log = os.open(self.folder.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.chdir(self.folder)
        ours = [str(self.folder), str(self.folder / "testing")]
        sys.path[:] = ours + [path for path in sys.path if not path.startswith(str(self.root)) or ".venv" in path]
        os.environ["PYTHONPATH"] = os.pathsep.join(ours)
        # What an editable installation puts there finds the package in the checkout, before any path is looked at.
        sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable_")]
        for name in [name for name in sys.modules if name == "mutation" or name.startswith("mutation.")]:
            del sys.modules[name]
        options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(self.folder)]
        return int(pytest.main([*options, *tests], plugins=[_FirstFailure(report)]))


def _read(report: Path) -> dict:
    try:
        return json.loads(report.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # not written yet, or being written
        return {}
