"""README and docs do what they say: every block runs, every link leads somewhere, CI runs the README's command."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qvlm_hf.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: .*?-->\n)?```(python|bash)\n(.*?)```", re.S)
TEST_COMMAND = 'pip install torch==2.13.0 ".[test]" && pytest'
WITH_HUB = ("publishing.md",)  # run by tests/hub/test_pages.py
DEMO_COMMAND = "pip install torch==2.13.0 . && qvlm demo"


def blocks(page):
    return [
        (language, code)
        for skipped, language, code in BLOCK.findall(page.read_text())
        if not skipped
    ]


def test_ci_runs_the_readmes_test_command():
    commands = [code.strip() for language, code in blocks(ROOT / "README.md") if language == "bash"]
    assert commands == [DEMO_COMMAND, TEST_COMMAND]
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text()


def test_the_readmes_example_is_one_block_that_compiles():
    (example,) = [
        code for language, code in blocks(ROOT / "README.md") if language == "python"
    ]  # .ci/run executes it
    compile(example, "README.md", "exec")
    assert len([line for line in example.splitlines() if line and "import" not in line]) <= 6


def run_blocks(page):
    namespace = {}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, page.name, "exec"), namespace)
        else:
            program, *arguments = shlex.split(code)
            if program == "optimum-cli":
                subprocess.run(
                    [sys.executable, "-m", "optimum.commands.optimum_cli", *arguments], check=True
                )
                continue
            assert program == "qvlm"
            assert main(arguments) == 0


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in ("README.md", *WITH_HUB) and blocks(page)],
    ids=lambda page: page.name,
)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


def test_few_blocks_are_not_run():
    assert (
        sum(bool(skipped) for page in PAGES for skipped, _, _ in BLOCK.findall(page.read_text()))
        <= 3
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_functions_named_in_the_algorithm_exist():
    import importlib

    for name in re.findall(
        r"`((?:core|calibration)\.[\w.]+)`", (ROOT / "docs" / "algorithm.md").read_text()
    ):
        module, _, attribute = name.partition(".")[2].partition(".")
        found = importlib.import_module(f"qvlm_hf.{name.split('.')[0]}.{module}")
        for part in attribute.split("."):
            found = getattr(found, part) if part != "granularity" else found


# Words of other packages, and what is no message at all.
FOREIGN = {
    "You set ignore_mismatched_sizes to False", "Unknown quantization type, got qvlm", "Can't load image processor",
    "Impossible to guess which processor", "QVLMConfig is not JSON serializable", "Accelerator qvlm not recognized",
    "conflicting subparser",
    "is not a plain torch.nn.Linear",
}  # fmt: skip


def source_texts():
    """Every string of the package, with a mark where a value is put in."""
    for path in (ROOT / "qvlm_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    part.value if isinstance(part, ast.Constant) else "\0" for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_of_the_troubleshooting_page_are_ours():
    rows = [
        line.split("|")[1]
        for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    messages = [
        message
        for row in rows
        for message in re.findall(r"`([^`]+)`", row.partition(" from ")[0].partition(" in ")[0])
    ]
    assert len(messages) > 40
    texts = "\n".join(source_texts())
    for message in set(messages) - FOREIGN:
        for part in re.split(r"\.\.\.", message):
            assert part.strip(" ()[]:=,") in texts, message
    assert set(messages) >= FOREIGN
