"""Kernels without a compiler and without tilelang: a folder, or a wheel, that needs torch and apache-tvm-ffi alone.

    tilelang-ext export --ops scaled_mm mxfp4_moe --arch sm_90a --out DIR

The package `tilelang_ext_aot` in it has the face (`face`), copies of those of our files that need torch alone, the native
launcher, a table of variants for each operator and the cubins. `wheel` packs it, `hub` puts it in the layout of kernels of the
Hugging Face Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import tilelang_ext
from tilelang_ext.ahead import Call, mxfp4_moe, scaled_mm
from tilelang_ext.kernels.mxfp4_moe.signature import RECIPE as RECIPE_OF_MOE
from tilelang_ext.kernels.scaled_mm.signature import MEMBERS
from tilelang_ext.kernels.scaled_mm.signature import RECIPE as RECIPE_OF_MATMUL
from tilelang_ext.launch.plan import find_library, launcher

PACKAGE = "tilelang_ext_aot"
REQUIREMENTS = ("torch>=2.10", "apache-tvm-ffi>=0.1.11")
_RECIPES = {"scaled_mm": RECIPE_OF_MATMUL, "mxfp4_moe": RECIPE_OF_MOE}
_COPIED = (
    *("formats.py", "quantization.py", "checkpoints.py"),
    *("launch/expression.py", "launch/gradient.py", "launch/plan.py"),
    *(f"kernels/scaled_mm/{name}.py" for name in ("__init__", "arguments", "signature")),
    *(
        f"kernels/mxfp4_moe/{name}.py"
        for name in ("__init__", "activation", "arguments", "problem", "signature", "sm90_packing", "sm90_tiles", "weights")
    ),
    *("export/face/__init__.py", "export/face/table.py"),
)
_IMPORT = re.compile(r"^(\s*from )tilelang_ext\b", re.MULTILINE)


class _Plan:
    """A plan that keeps what is added to it."""

    def __init__(self, operator: str):
        self._plan = launcher().plan(_RECIPES[operator], MEMBERS if operator == "scaled_mm" else None)
        self.added: list[tuple] = []

    def key(self, *arguments) -> tuple[list[int], int]:
        return self._plan.key(*arguments)

    def add(self, variant: dict, cubins: Sequence[bytes], constants: Sequence = ()) -> None:
        self._plan.add(variant, cubins, constants)  # which checks them
        self.added.append((variant, list(cubins), list(constants)))


def export(calls: Sequence[Call], arch: str, out: Path) -> Path:
    """Write the package for these calls, whose kernels are compiled where the cache lacks them, into `out`; return its folder.

    Raises FileExistsError where `out` has one already.
    """
    package = out / PACKAGE
    if package.exists():
        raise FileExistsError(f"export: {package} must not exist; got a folder; remove it, or pass another --out")
    root = Path(tilelang_ext.__file__).parent
    for name in _COPIED:
        _write(package / name, _IMPORT.sub(rf"\1{PACKAGE}", (root / name).read_text()))
    for folder in ("launch", "kernels", "export"):
        _write(package / folder / "__init__.py", "")
    _write(package / "__init__.py", _face_of((root / "export/face/__init__.py").read_text()))
    library = package / "lib" / find_library().name
    library.parent.mkdir()
    shutil.copy(find_library(), library)
    for operator in dict.fromkeys(call.operator for call in calls):
        _write_operator(package, operator, [call for call in calls if call.operator == operator], arch)
    return package


def _face_of(text: str) -> str:
    """Return what the package itself gives: the names of its face, and their description."""
    description = text[: text.index('"""', 3) + 3]
    names = f"from {PACKAGE}.export.face import *  # noqa: F403\nfrom {PACKAGE}.export.face import __all__  # noqa: F401"
    return f'{description}\n\n{names}\n\n__version__ = "{tilelang_ext.__version__}"\n'


def _write_operator(package: Path, operator: str, calls: Sequence[Call], arch: str) -> None:
    plan = _Plan(operator)
    described = []
    for call in calls:
        if operator == "scaled_mm":
            scaled_mm.add_call(plan, call.problem, call.arguments)
        else:
            mxfp4_moe.add_call(plan, call.problem, call.arguments, arch)
        described.append(str(call.problem))
    variants = []
    for what, (variant, cubins, constants) in zip(described, plan.added, strict=True):
        names = [f"{hashlib.sha256(cubin).hexdigest()[:32]}.cubin" for cubin in cubins]
        for name, cubin in zip(names, cubins, strict=True):
            _write(package / "cubins" / name, cubin)
        kept = [{"dtype": str(each.dtype).removeprefix("torch."), "values": each.tolist()} for each in constants]
        variants.append({"what": what, "recipe": variant, "cubins": names, "constants": kept})
    _write(package / "operators" / f"{operator}.json", json.dumps({"recipe": _RECIPES[operator], "variants": variants}))


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


# --- the same in other packings --------------------------------------------------------------------------------------


def wheel(package: Path, out: Path) -> Path:
    """Pack an exported package as a wheel in `out`; return its path."""
    version = tilelang_ext.__version__
    system = f"linux_{platform.machine()}" if platform.system() == "Linux" else "any"
    path = out / f"{PACKAGE}-{version}-py3-none-{system}.whl"
    info = f"{PACKAGE}-{version}.dist-info"
    requires = "".join(f"Requires-Dist: {requirement}\n" for requirement in REQUIREMENTS)
    files = {
        f"{PACKAGE}/{file.relative_to(package)}": file.read_bytes() for file in sorted(package.rglob("*")) if _is_file(file)
    }
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {version}\nRequires-Python: >=3.10\n{requires}"
        "Summary: scaled_mm and mxfp4_moe of tilelang_ext, compiled ahead\nLicense: MIT\n"
    ).encode()
    files[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: tilelang-ext export\nRoot-Is-Purelib: false\nTag: py3-none-{system}\n".encode()
    )
    record = "".join(f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _is_file(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def hub(package: Path, out: Path, arch: str, cuda: str = "cu130") -> Path:
    """Put an exported package in the layout of the Hugging Face Hub's kernels in `out`; return the folder of its build.

    The package's modules import one another by its name, so the build's `__init__` puts its own folder on the path first. The
    layout is that of kernel-requirements.md of huggingface/kernels: build/<framework>-<backend>-<machine>-<system>. `arch` is
    what it was exported for, as sm_90a; `cuda` the version of CUDA that torch must be built for.
    """
    build = out / "build" / f"tvm-ffi01-{cuda}-{platform.machine()}-linux"
    name = PACKAGE
    shutil.copytree(package, build / name, ignore=shutil.ignore_patterns("__pycache__"))
    _write(
        build / "__init__.py",
        f'"""Loads {name}, which lies beside this file."""\n\nimport sys\nfrom pathlib import Path\n\n'
        f"sys.path.insert(0, str(Path(__file__).parent))\n\nfrom {name} import *  # noqa: E402, F403\n",
    )
    tables = b"".join(path.read_bytes() for path in sorted((package / "operators").glob("*.json")))
    number = re.fullmatch(r"sm_(\d+)(\d[af]?)", arch)
    metadata = {
        "id": f"{name}_cuda_{hashlib.sha256(tables).hexdigest()[:12]}",  # of this content and backend
        "name": name.replace("_", "-"),
        "version": 1,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "cuda", "archs": [".".join(number.groups())] if number else []},
    }
    _write(build / "metadata.json", json.dumps(metadata))
    _write(
        out / "build.toml",
        f'[general]\nname = "{name.replace("_", "-")}"\nversion = 1\nlicense = "MIT"\nbackends = ["cuda"]\n\n'
        "# Built ahead by tilelang-ext export: cubins and the launcher's library lie in build/.\n[tvm-ffi]\nsrc = []\n",
    )
    return build
