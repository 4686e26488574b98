"""Runs the tests of what touches Transformers on other versions than the installed ones.

    python tests/versions.py oldest newest        of what pyproject.toml allows and the registry has
    python tests/versions.py minors --write       the last release of each minor; docs/compatibility.md
    python tests/versions.py 5.22.0 torch=oldest

A version is one of Transformers, or of the package named before "=". Each gets an environment on
top of the one that runs this, so only what differs is installed. What follows as options is
pytest's.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
import xml.etree.ElementTree as xml
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
SHOWN = ("transformers", "torch", "huggingface-hub", "accelerate", "peft")
# What touches Transformers: loading, saving, generating, caches, adapters, compilers, pipelines.
TESTS = (
    "runtime", "test_checkpoint.py", "test_compile.py", "test_deprecations.py", "test_golden.py",
    "test_peft.py", "test_pipelines.py", "test_quantizer.py", "test_round_trip.py",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One run: the versions by package, and how many tests ended how."""

    versions: dict[str, str]
    passed: int
    failed: int
    skipped: int


def allowed(package: str) -> list[Version]:
    """The versions of a package that the registry has and pyproject.toml allows, in order."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [Requirement(entry) for entry in project["dependencies"]]
    (requirement,) = [entry for entry in found if entry.name == package]
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = re.findall(r"Available versions: (.*)", listing)
    return sorted(requirement.specifier.filter({Version(text) for text in line.split(", ")}))


def chosen(argument: str) -> list[tuple[str, str]]:
    """Package and versions that an argument asks for."""
    *package, version = argument.split("=")
    name = package[0] if package else "transformers"
    if version in ("oldest", "newest"):
        return [(name, str(allowed(name)[0 if version == "oldest" else -1]))]
    if version == "minors":
        last = {found.release[:2]: found for found in allowed(name)}
        return [(name, str(found)) for found in last.values()]
    return [(name, str(Version(version)))]


def is_here(package: str, version: str) -> bool:
    """Whether the environment that runs this has that version."""
    try:
        return installed_version(package).partition("+")[0] == version
    except PackageNotFoundError:
        return False


def interpreter(package: str, version: str, folder: Path) -> str:
    """Python with that version of the package and everything else as here."""
    if is_here(package, version):
        return sys.executable
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    here = sysconfig.get_paths()["purelib"]
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "below.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    install = [python, "-m", "pip", "install", "--quiet", f"{package}=={version}"]
    subprocess.run(install, check=True)
    return python


def run(python: str, folder: Path, files: list[str], more: list[str]) -> Result:
    """Runs the tests; prints what pytest prints."""
    report = folder / "report.xml"
    # -P: the installed package, not the one in the current folder
    command = [python, "-P", "-m", "pytest", "-q", f"--junitxml={report}", *files, *more]
    status = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONWARNINGS": ""}).returncode
    if status not in (0, 1):
        raise SystemExit(f"pytest ended with status {status}")
    suites = xml.parse(report).getroot().iter("testsuite")
    count = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for name in count:
            count[name] += int(suite.get(name, 0))
    script = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    shown = subprocess.run(
        [python, "-c", script, *SHOWN], capture_output=True, text=True, check=True
    )
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return Result(
        dict(zip(SHOWN, shown.stdout.split(), strict=True)), passed, failed, count["skipped"]
    )


def page(results: list[Result]) -> str:
    """docs/compatibility.md."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [entry for entry in project["dependencies"] if Requirement(entry).name in SHOWN]
    python = ".".join(map(str, sys.version_info[:2]))
    head = [*SHOWN, "passed", "failed", "skipped"]
    rows = [
        [*(result.versions[name] for name in SHOWN), result.passed, result.failed, result.skipped]
        for result in results
    ]
    table = [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]
    lines = [
        "# Versions that were seen to work",
        "",
        f"Allowed: {', '.join(f'`{entry}`' for entry in ranges)}, Python "
        f"{project['requires-python']}.",
        f"Run: on Python {python}, the tests of what touches Transformers. They load, save, "
        f"calibrate,",
        "generate with every kind of cache, train LoRA and compile, on small models on a CPU.",
        "",
        *table,
        "",
        "CI runs the oldest and the newest Transformers for each change, the nightly every minor "
        "one.",
        "This page is written by `tests/versions.sh oldest minors torch=oldest --write`.",
        "",
        "On another version the package says in a warning and in `precision_table` which of its "
        "parts",
        "it left to Transformers. `qvlm check DIR` decodes with a saved model on the versions at "
        "hand.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", metavar="[PACKAGE=]VERSION|oldest|newest|minors")
    parser.add_argument("--write", action="store_true", help="docs/compatibility.md")
    parser.add_argument("--others", action="store_true", help="leave out what is installed here")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="others than those of tests/hf")
    options, more = parser.parse_known_args()
    files = options.tests or [f"tests/hf/{name}" for name in TESTS]
    results = []
    asked = [pair for argument in options.versions for pair in chosen(argument)]
    for package, version in dict.fromkeys(asked):
        if options.others and is_here(package, version):
            continue
        print(f"== {package} {version}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            python = interpreter(package, version, Path(folder) / "env")
            results.append(run(python, Path(folder), files, more))
    if options.write:
        PAGE.write_text(page(results))
    for result in results:
        versions = ", ".join(f"{name} {value}" for name, value in result.versions.items())
        print(
            f"{result.passed} passed, {result.failed} failed, {result.skipped} skipped: {versions}"
        )
    raise SystemExit(any(result.failed for result in results))


if __name__ == "__main__":
    main()
