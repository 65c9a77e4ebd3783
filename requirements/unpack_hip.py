"""Put HIP's headers and device libraries, 3 MB of the triton wheel's 1 GB, into this environment's share/tilelang_ext/amd.

Does nothing where they, or a triton with its own, are there already. tilelang_ext.rocm.toolchain looks in both places.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = "triton/backends/amd/"
WANTED = (f"{FOLDER}include/", f"{FOLDER}lib/ocml.bc", f"{FOLDER}lib/ockl.bc")
DESTINATION = Path(sys.prefix) / "share" / "tilelang_ext" / "amd"

if not DESTINATION.is_dir() and importlib.util.find_spec("triton") is None:
    DESTINATION.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DESTINATION.parent) as name:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        requirements = Path(__file__).with_name("hip.txt")
        subprocess.run([*pip, "--only-binary", ":all:", "--dest", name, "-r", str(requirements)], check=True)
        (wheel,) = Path(name).glob("triton-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(name, [member for member in archive.namelist() if member.startswith(WANTED)])
        shutil.move(Path(name) / FOLDER, DESTINATION)
