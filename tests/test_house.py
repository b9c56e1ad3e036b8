"""The house rules that a linter can't hold. Each check is first shown to fail on a bad snippet."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "lamina"
FILES = sorted(SOURCE.rglob("*.py"))

MAX_LINES = 400
MAX_FUNCTION = 60
LONG_FUNCTIONS: dict[str, str] = {}
"""`part/file.py:function` → why it is longer than it should be. A row whose reason is gone fails the test."""

LAZY_PARTS = frozenset(
    {"core", "report", "cli", "pipeline", "papers", "planners", "policies"}
    | {"rewrites", "healers", "evaluators", "exporters"}
)
TRAVELS = tuple(f"rewrites/{name}.py" for name in ("structure", "lamina_parts", "lamina_attention", "lamina_layouts"))
"""Goes with checkpoints and runs without lamina, so that it may import torch."""

HEAVY = frozenset({"torch", "transformers", "peft", "accelerate", "datasets", "safetensors.torch"})
NAMES_ALLOWED = frozenset({"anatomy", "testing"})
MODULE_NAME = re.compile(
    r"(?<![A-Za-z0-9])("
    r"[qkvo]_proj|qkv_proj|(gate|up|down|gate_up)_proj|c_(attn|proj|fc)|self_attn|query_key_value|dense_h_to_4h"
    r"|\w*layernorm\w*|embed_tokens|lm_head|model\.layers"
    r")(?![A-Za-z0-9])"
)
PICKLES = frozenset({"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def part_of(name: str) -> str:
    """The part of the house that `name` (relative to the package) belongs to: `core/files.py` → core."""
    return name.partition("/")[0].removesuffix(".py")


def file_length(name: str, text: str) -> list[str]:
    """No file above 400 lines."""
    lines = len(text.splitlines())
    return [f"{name}: {lines} lines, at most {MAX_LINES}; split it by concept"] if lines > MAX_LINES else []


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a module, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def function_length(name: str, text: str) -> list[str]:
    """No function above 60 lines, 40 is the aim."""
    long = {f"{name}:{f.name}": f.end_lineno - f.lineno + 1 for f in functions(ast.parse(text)) if f.end_lineno}
    return [
        f"{at}: {lines} lines, at most {MAX_FUNCTION}"
        for at, lines in long.items()
        if lines > MAX_FUNCTION and at not in LONG_FUNCTIONS
    ]


def imports_at_top(body: list[ast.stmt]) -> Iterator[tuple[str, int]]:
    """Modules that are imported when the module is: not in functions, not under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports_at_top(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from imports_at_top(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from imports_at_top(handler.body)


def lazy_torch(name: str, text: str) -> list[str]:
    """Parts that list and report import torch inside functions only; those may import `_private.py` files."""
    private = Path(name).name.startswith("_") and Path(name).name != "__init__.py"
    if part_of(name) not in LAZY_PARTS or name in TRAVELS or private:
        return []
    heavy = tuple(imports_at_top(ast.parse(text).body))
    return [
        f"{name}:{line}: imports {module} at the top; import it inside the function"
        for module, line in heavy
        if any(module == h or module.startswith(h + ".") for h in HEAVY)
    ]


def docstrings(tree: ast.Module) -> set[int]:
    """The identities of the constants that are docstrings (or text that stands alone)."""
    return {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}


def module_names(name: str, text: str) -> list[str]:
    """Names of a model's modules live in anatomy, and in the tiny models of testing."""
    if part_of(name) in NAMES_ALLOWED:
        return []
    tree = ast.parse(text)
    prose = docstrings(tree)
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found += [(hit.group(), node.lineno) for hit in MODULE_NAME.finditer(node.value)]
        elif isinstance(node, ast.Attribute) and MODULE_NAME.fullmatch(node.attr):
            found.append((node.attr, node.lineno))
    return [f"{name}:{line}: knows a model's module by name: {word}" for word, line in found]


def unfinished(name: str, text: str) -> list[str]:
    """Nothing is left for later."""
    lines = enumerate(text.splitlines(), 1)
    marks = [f"{name}:{i}: {hit.group()}" for i, line in lines for hit in UNFINISHED.finditer(line)]
    raises = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Raise) and n.exc]
    return marks + [f"{name}:{n.lineno}: not implemented" for n in raises if "NotImplementedError" in ast.unparse(n)]


def public(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, Definition]]:
    """Public classes, functions and methods; overloads and what is nested in functions left out."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            if any("overload" in ast.unparse(d) or ".setter" in ast.unparse(d) for d in node.decorator_list):
                continue
            yield owner + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{owner}{node.name}.")


def documented(name: str, text: str) -> list[str]:
    """Every public class, function and method has a docstring."""
    found = public(ast.parse(text).body)
    return [f"{name}:{node.lineno}: {what} has no docstring" for what, node in found if not ast.get_docstring(node)]


def no_pickles(name: str, text: str) -> list[str]:
    """safetensors, Parquet, JSON and YAML only."""
    bad: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            bad += [(a.name, node.lineno) for a in node.names if a.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            bad.append((str(node.module), node.lineno))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save"}:
            bad.append((ast.unparse(node), node.lineno))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            bad.append(("allow_pickle", node.value.lineno))
    return [f"{name}:{line}: {what} reads or writes pickles" for what, line in bad]


Check = Callable[[str, str], list[str]]
LONG_BODY = "    x = 1\n"
BAD: list[tuple[Check, str, str]] = [
    (file_length, "core/a.py", "x = 1\n" * (MAX_LINES + 1)),
    (function_length, "core/a.py", "def f():\n" + LONG_BODY * MAX_FUNCTION),
    (function_length, "core/a.py", "class A:\n    def f(self):\n" + ("    " + LONG_BODY) * MAX_FUNCTION),
    (lazy_torch, "core/a.py", "import torch\n"),
    (lazy_torch, "papers/cut/a.py", "from torch import nn\n"),
    (lazy_torch, "cli.py", "try:\n    import torch.nn as nn\nexcept ImportError:\n    nn = None\n"),
    (lazy_torch, "rewrites/a.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import transformers\n"),
    (lazy_torch, "exporters/__init__.py", "import torch\n"),
    (lazy_torch, "exporters/a.py", "class A:\n    import torch\n"),
    (module_names, "papers/a.py", "x = 'mlp.down_proj'\n"),
    (module_names, "rewrites/a.py", "x = f'{p}.self_attn.{q}'\n"),
    (module_names, "lab/a.py", "block.input_layernorm(x)\n"),
    (unfinished, "core/a.py", "x = 1  # " + "TO" + "DO: y\n"),
    (unfinished, "core/a.py", "def f():\n    raise " + "NotImplementedError\n"),
    (unfinished, "core/a.py", "def f():\n    raise " + "NotImplementedError('x')\n"),
    (documented, "core/a.py", "def f():\n    return 1\n"),
    (documented, "core/a.py", "class A:\n    '''A.'''\n    def f(self):\n        return 1\n"),
    (no_pickles, "lab/a.py", "import pickle\n"),
    (no_pickles, "lab/a.py", "from joblib import load\n"),
    (no_pickles, "lab/a.py", "x = torch.load(path)\n"),
    (no_pickles, "lab/a.py", "np.load(path, allow_pickle=True)\n"),
]
GOOD: list[tuple[Check, str, str]] = [
    (file_length, "core/a.py", "x = 1\n" * MAX_LINES),
    (function_length, "core/a.py", "def f():\n" + LONG_BODY * (MAX_FUNCTION - 1)),
    (lazy_torch, "papers/a.py", "if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch\n"),
    (lazy_torch, "maths/a.py", "import torch\n"),
    (lazy_torch, TRAVELS[0], "import torch\n"),
    (lazy_torch, "core/a.py", "import torchless\n"),
    (lazy_torch, "exporters/_a.py", "import torch\n"),
    (module_names, "anatomy/a.py", "x = 'mlp.down_proj'\n"),
    (module_names, "papers/a.py", "'''Speaks of q_proj.'''\nx = F.layer_norm(y)\n"),
    (unfinished, "core/a.py", "def f():\n    return NotImplemented\n"),
    (documented, "core/a.py", "def _f():\n    def g():\n        return 1\n    return g\n"),
    (no_pickles, "lab/a.py", "np.load(path, allow_pickle=False)\ntorch.loader(x)\n"),
]
CHECKS: list[Check] = list(dict.fromkeys(check for check, _, _ in BAD))


def label(value: object) -> str | None:
    """Short test names."""
    return value.__name__ if callable(value) else None  # type: ignore[no-any-return,attr-defined]


@pytest.mark.parametrize(("check", "name", "text"), BAD, ids=label)
def test_each_check_can_fail(check: Check, name: str, text: str) -> None:
    complaints = check(name, text)
    assert len(complaints) == 1, complaints
    assert complaints[0].startswith(name)


@pytest.mark.parametrize(("check", "name", "text"), GOOD, ids=label)
def test_each_check_can_pass(check: Check, name: str, text: str) -> None:
    assert check(name, text) == []


@pytest.mark.parametrize("check", CHECKS, ids=label)
def test_the_house(check: Check) -> None:
    assert len(FILES) > 5
    complaints = [
        complaint
        for file in FILES
        for complaint in check(file.relative_to(SOURCE).as_posix(), file.read_text(encoding="utf-8"))
    ]
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_list_of_long_functions_holds_no_dead_rows() -> None:
    lengths = {
        f"{file.relative_to(SOURCE).as_posix()}:{f.name}": (f.end_lineno or 0) - f.lineno + 1
        for file in FILES
        for f in functions(ast.parse(file.read_text(encoding="utf-8")))
    }
    dead = [row for row in LONG_FUNCTIONS if lengths.get(row, 0) <= MAX_FUNCTION]
    assert not dead
    assert len(LONG_FUNCTIONS) <= 5


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter on this tree."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)


@pytest.mark.parametrize(
    "code",
    [
        "from lamina.core.registry import discover; discover()",
        "import lamina.report",
        "import lamina.cli",
    ],
    ids=["the registry", "the report", "the command line"],
)
def test_listing_and_reporting_leave_torch_alone(code: str) -> None:
    done = fresh(f"{code}\nprint(sorted({set(HEAVY)!r} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_test_above_can_see_torch() -> None:
    done = fresh(f"import torch\nprint(sorted({set(HEAVY)!r} & set(sys.modules)))")
    assert done.stdout.strip() == "['torch']"


def versions(pyproject: str, citation: str, changelog: str) -> dict[str, str]:
    """The version that each of the three files states."""
    top = re.search(r"^## \[?(\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    return {
        "pyproject.toml": tomllib.loads(pyproject)["project"]["version"],
        "CITATION.cff": str(yaml.safe_load(citation)["version"]),
        "CHANGELOG.md": top.group(1) if top else "none",
    }


def test_one_version_everywhere() -> None:
    stated = versions(
        *((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"))
    )
    assert len(set(stated.values())) == 1, stated


def test_another_version_would_be_seen() -> None:
    stated = versions("[project]\nversion = '0.2.0'", "version: 0.1.0", "# Changelog\n\n## 0.1.0 - 2026-01-01\n")
    assert stated == {"pyproject.toml": "0.2.0", "CITATION.cff": "0.1.0", "CHANGELOG.md": "0.1.0"}


def test_no_test_reaches_the_network() -> None:
    import socket

    with pytest.raises(RuntimeError, match="tried to reach the network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(RuntimeError, match="tried to reach the network"):
        socket.getaddrinfo("example.org", 80)
