#!/usr/bin/env python3
"""compile_once.py COMPILER ARGUMENT...: run the compiler, or copy what it made of the same text by the same options before.

CMake's CXX_COMPILER_LAUNCHER of `.ci/run`, whose installs build the same files several times, each in a folder of its own: the
text is compared after preprocessing, without the names of these folders. Objects are kept in the folder that COMPILE_ONCE
names; a place in a check's message may name the folder of the first build.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

WITH_VALUE = ("-o", "-MF", "-MT", "-MQ", "-I", "-isystem")


def main(command: list[str]) -> int:
    if "-c" not in command or "-o" not in command:
        return subprocess.call(command)
    options, values = [], {}
    arguments = iter(command[1:])
    for argument in arguments:
        if argument in WITH_VALUE:
            values.setdefault(argument, []).append(next(arguments))
        elif argument == "-c":
            source = next(arguments)
        elif argument.startswith("-I"):
            values.setdefault("-I", []).append(argument[2:])
        elif not argument.startswith("-M"):
            options.append(argument)
    includes = [part for name in ("-I", "-isystem") for folder in values.get(name, ()) for part in (name, folder)]
    text = subprocess.run([command[0], *options, *includes, "-E", "-P", source], capture_output=True, check=False)
    if text.returncode:
        return subprocess.call(command)
    folders = {*values.get("-I", ()), *values.get("-isystem", ()), os.getcwd()}
    pattern = "|".join(re.escape(folder) for folder in sorted(folders, key=len, reverse=True))
    key = hashlib.sha256(re.sub(pattern.encode(), b"", text.stdout))
    options.sort(key=lambda option: option.startswith("-std"))  # whose place differs between CMake's versions
    key.update("\0".join([os.path.realpath(shutil.which(command[0])), *options]).encode())
    kept, [to] = Path(os.environ["COMPILE_ONCE"], key.hexdigest()), values["-o"]
    if not kept.exists():
        if status := subprocess.call(command):
            return status
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(to, partial)
        partial.rename(kept)
        return 0
    shutil.copyfile(kept, to)
    for file in values.get("-MF", ()):
        Path(file).write_text(f"{to}: {source}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
