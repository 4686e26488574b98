"""The rules of style that no tool knows; tests/style.sh runs the tools."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qvlm_hf"
FILES = sorted(PACKAGE.rglob("*.py"))
UNSHIPPED = PACKAGE / "optimum" / "namespace" / "__init__.py"  # the build maps its neighbours alone
OPTIONAL = {
    "triton",
    "sklearn",
}  # extras: a module that needs one is read, but imported only where it is installed
PRINTERS = (PACKAGE / "cli",)  # what a user runs and reads


def relative(path):
    return str(path.relative_to(ROOT))


def module_name(path):
    if path.parent.name == "namespace" and path.stem != "__init__":  # the build puts them there
        return f"optimum.{'' if path.stem == 'qvlm' else 'commands.register.'}{path.stem}"
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", [path for path in FILES if path != UNSHIPPED], ids=relative)
def test_public_names_are_listed_exist_and_are_documented(path):
    try:
        module = importlib.import_module(module_name(path))
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    listed = getattr(module, "__all__", None)
    tree = ast.parse(path.read_text())
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    public = {node.name for node in definitions if not node.name.startswith("_")}
    if listed is None:
        assert not public, f"{path.name} defines {sorted(public)} and has no __all__"
        return
    assert len(set(listed)) == len(listed)
    documented = {node.name for node in definitions if ast.get_docstring(node)}
    for name in listed:
        thing = getattr(module, name)  # raises if it does not exist
        if name in {node.name for node in definitions}:
            assert name in documented, f"{name} has no docstring"
        elif inspect.isfunction(thing) or inspect.isclass(thing):
            assert inspect.getdoc(thing), f"{name} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_modules_say_what_they_are(path):
    assert ast.get_docstring(ast.parse(path.read_text())), "no module docstring"
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "base", "misc"}
    assert not {
        part
        for part in path.relative_to(ROOT).parts[:-1]
        if part in {"utils", "helpers", "common", "base", "misc"}
    }


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if not any(path.is_relative_to(printer) for printer in PRINTERS)],
    ids=relative,
)
def test_does_not_print(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    prints = [
        node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not prints, f"print() in lines {prints}"


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


def test_triton_is_imported_in_one_file():
    assert [relative(path) for path in FILES if "triton" in imported(path)] in (
        [],
        ["qvlm_hf/ops/triton_kernels.py"],
    )


def test_the_method_never_imports_transformers():
    """In a fresh process, below a bare package: qvlm_hf itself registers the quantizer."""
    names = [
        module_name(path)
        for path in FILES
        if path.relative_to(ROOT).parts[1] in ("format", "models", "ops", "nn", "calibration")
    ]
    names = [name for name in names if not name.endswith("triton_kernels")]
    assert len(names) > 10
    code = f"""
import importlib, sys, types
package = types.ModuleType("qvlm_hf")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["qvlm_hf"] = package
for name in {names!r}:
    importlib.import_module(name)
    loaded = {{"transformers", "huggingface_hub", "optimum", "accelerate", "datasets"}} & set(sys.modules)
    assert not loaded, f"{{name}} imports {{loaded}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
