"""Write docs/api/index.md: signatures and docstrings of the public names of tilelang_ext and of its language.

    python docs/generate_api.py            # rewrite the page
    python docs/generate_api.py --check    # say whether it is up to date

testing/test_api_doc.py fails when the page is out of date.
"""

import inspect
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tilelang.language

import tilelang_ext
from tilelang_ext import language

DOCUMENT = Path(__file__).resolve().parent / "api" / "index.md"
WIDTH = 128
TITLE = """\
# API reference

`python docs/generate_api.py` writes this page from signatures and docstrings; do not edit it.

## tilelang_ext

`from tilelang_ext import ...`. Each name is loaded on first use.
"""
LANGUAGE = """\
## tilelang_ext.language

`from tilelang_ext import language as T` has everything of `tilelang.language`, and these names.
"""


def generate() -> str:
    """Return the text of the page."""
    parts = [TITLE]
    for name in sorted(tilelang_ext.__all__, key=str.lower):
        if callable(getattr(tilelang_ext, name)):
            parts.append(entry(name, getattr(tilelang_ext, name)))
    parts.append(LANGUAGE)
    described = set()
    for name in language_names():
        value = getattr(language, name)
        parts.append(entry(f"T.{name}", value))
        # Below the title of its docstring, the module of an intrinsic has the equation and the table of operands.
        module = sys.modules[value.__module__]
        if module.__name__.startswith(language.__name__) and module not in described:
            described.add(module)
            parts += [text for text in [documentation(module).partition("\n\n")[2]] if text]
    return "\n".join(parts)


def language_names() -> list[str]:
    """Return the names that mean in our language what they do not in upstream's, those of one module together.

    Upstream's functions whose arguments are checked before mean the same.
    """

    def is_ours(name: str) -> bool:
        value, upstream = getattr(language, name), getattr(tilelang.language, name, None)
        return value is not upstream and getattr(value, "__wrapped__", value) is not upstream

    names = set(filter(is_ours, language.__all__))
    return sorted(names, key=lambda name: (getattr(language, name).__module__, name))


def entry(name: str, value) -> str:
    """Return the section of one function, or of one class and its public methods."""
    text = f"### {name}\n\n{signature(name, value)}\n{documentation(value)}"
    if inspect.isclass(value):
        for method, function in vars(value).items():
            function = getattr(function, "__func__", function)  # of a class method
            if not method.startswith("_") and inspect.isfunction(function) and function.__doc__:
                text += f"\n{signature('.' + method, function)}\n{documentation(function)}"
    return text


def signature(name: str, value) -> str:
    """Return a signature as a block of Python, with one parameter per line where one line would be too long."""
    whole = inspect.signature(value)
    parameters = [p for p in whole.parameters.values() if p.name not in ("self", "cls")]
    text = name + str(whole.replace(parameters=parameters))
    if len(clean(text)) > WIDTH:
        lines, bare_star = [], not any(p.kind is p.VAR_POSITIONAL for p in parameters)
        for parameter in parameters:
            if parameter.kind is parameter.KEYWORD_ONLY and bare_star:
                lines.append("    *,")
                bare_star = False
            lines.append(f"    {parameter},")
        returned = str(whole.replace(parameters=[]))[1:]
        text = "\n".join([f"{name}(", *lines, returned])
    return f"```python\n{clean(text)}\n```\n"


def clean(text: str) -> str:
    """Return a signature with annotations as they are written in the source, and strings in double quotes."""
    text = re.sub(r"ForwardRef\('([^']*)'[^)]*\)", r"\1", text)
    text = re.sub(r"((?:: |-> ))'([^']*)'", r"\1\2", text)
    return text.replace("'", '"')


def documentation(value) -> str:
    """Return a docstring as Markdown; every public name must have one."""
    if not value.__doc__:
        raise SystemExit(f"{value.__name__}: a public name must have a docstring; got none; write one")
    return inspect.cleandoc(value.__doc__) + "\n"


if __name__ == "__main__":
    page = generate()
    if "--check" in sys.argv:
        sys.exit(f"{DOCUMENT.name}: out of date; run python docs/generate_api.py" if DOCUMENT.read_text() != page else 0)
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(page)
