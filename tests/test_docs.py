"""README and docs do what they say: blocks run, links lead somewhere, generated pages are fresh."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import write_docs

from qvlm_hf.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = ("fields.md", "commands.md", "models.md", "compatibility.md")
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
    # .ci/run executes it
    (example,) = [code for language, code in blocks(ROOT / "README.md") if language == "python"]
    compile(example, "README.md", "exec")
    assert sum(bool(line) for line in example.splitlines()) <= 8


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


def test_functions_of_the_equations_exist():
    """A row of the equation table names a file and, behind a colon, functions in it."""
    text = (ROOT / "docs" / "algorithm.md").read_text()
    named = re.findall(r"`([\w/]+\.py): ([\w, ]+)`", text)
    assert len(named) >= 9
    for path, functions in named:
        tree = ast.parse((ROOT / "qvlm_hf" / path).read_text())
        defined = {getattr(node, "name", None) for node in ast.walk(tree)}
        assert set(functions.split(", ")) <= defined, f"{path}: {functions}"


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.parent.name != "decisions" and page.name != "changelog.md"],
    ids=lambda page: page.name,
)
def test_files_named_in_the_pages_exist(page):
    """A path with a folder is below the tree or the package. Decisions are dated and keep theirs."""
    pattern = r"`((?:[\w.]+/)+(?:[\w.]+\.(?:py|cpp|h|sh|md|json)|(?=`)))`?"
    for name in re.findall(pattern, without_blocks(page)):
        if not name.startswith(("vllm/", "models/llava", "optimum/", "~")):
            assert any((ROOT / top / name).exists() for top in ("", "qvlm_hf")), name


def test_names_on_the_contributing_page_exist():
    names = re.findall(r"`([A-Za-z_]\w+)`", without_blocks(ROOT / "docs" / "contributing.md"))
    files = [path for top in ("qvlm_hf", "tests") for path in (ROOT / top).rglob("*.*")]
    code = "".join(path.read_text() for path in files if path.suffix in (".py", ".h", ".cpp"))
    words = set(re.findall(r"\w+", code)) | {path.stem for path in files}
    assert not set(names) - words


def without_blocks(page):
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def sentences(page):
    """The sentences of a page outside of code and tables, each as its words."""
    text = re.sub(r"<!--.*?-->", "", without_blocks(page), flags=re.S)
    text = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "#")))
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for paragraph in re.split(r"\n\s*(?:\n|- |\d+\. )|^- ", text):
        yield from (part.split() for part in re.split(r"(?<=[.:;?!])\)?\s", paragraph))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in GENERATED], ids=lambda page: page.name
)
def test_sentences_and_lines_are_short(page):
    """At most 25 words and 100 columns; tables and code may be wider."""
    long = [" ".join(words) for words in sentences(page) if len(words) > 25]
    assert not long, long
    lines = without_blocks(page).splitlines()
    assert not [line for line in lines if len(line) > 100 and not line.startswith(("|", "!["))]


def test_the_readme_fits_a_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", write_docs.PAGES)
def test_pages_made_from_code_are_as_the_code(name):
    assert (ROOT / name).read_text() == write_docs.PAGES[name](), "run: python tests/write_docs.py"


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
