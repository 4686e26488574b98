"""What a wheel, an editable install and the sources hold; Optimum's namespace is shared, and
nothing of Optimum's own is touched.
"""

import shutil
import subprocess
import sysconfig
import tarfile
import venv
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parent.parent
NAMESPACE = {"optimum/qvlm/__init__.py", "optimum/commands/register/register_qvlm.py"}
SOURCES = {"qvlm_hf/optimum/namespace/qvlm.py", "qvlm_hf/optimum/namespace/register_qvlm.py"}
CHECK = """
import sys, optimum.qvlm, qvlm_hf
from pathlib import Path
for module, place in zip((qvlm_hf, optimum.qvlm), sys.argv[1:], strict=True):
    assert Path(module.__file__).is_relative_to(place), module.__file__
"""


def wheel(version, folder):
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=[version])
    return Path(path)


def optimums_files():
    """What the distribution of Optimum installed, relative to site-packages."""
    return {str(file) for file in distribution("optimum").files if not str(file).startswith("..")}


def test_the_wheel_shares_optimums_namespace(tmp_path):
    names = ZipFile(wheel("standard", tmp_path)).namelist()
    assert {name for name in names if name.startswith("optimum/")} == NAMESPACE
    assert not set(names) & (optimums_files() | SOURCES)
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {
        "qvlm_hf",
        "optimum",
    }


def test_the_editable_wheel_points_here(tmp_path):
    contents = ZipFile(wheel("editable", tmp_path))
    (pointer,) = [name for name in contents.namelist() if name.endswith(".pth")]
    assert set(contents.read(pointer).decode().split()) == {str(ROOT)}
    assert {
        name for name in contents.namelist() if name.startswith(("optimum", "qvlm_hf/"))
    } == NAMESPACE


def test_the_sources_build_the_same(tmp_path):
    (archive,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert names >= SOURCES
    assert not [name for name in names if name.startswith("optimum/")]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["standard", "editable"])
def test_installs_and_uninstalls_beside_optimum(version, tmp_path):
    """In an environment of its own, which borrows the heavy packages of this one and has a copy of
    Optimum.
    """
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    site = Path(
        sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
    )
    for file in distribution("optimum").files:
        if str(file) in optimums_files():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), site / file)
    (site / "zz_borrowed.pth").write_text(str(Path(distribution("torch").locate_file(""))))

    def run(*words):
        return subprocess.run([python, "-I", *words], capture_output=True, text=True, cwd=tmp_path)

    def pip(*words):
        done = run("-m", "pip", "--disable-pip-version-check", *words)
        assert done.returncode == 0, done.stderr

    before = set(site.rglob("*.py"))
    pip("install", "--no-index", "--no-deps", "--force-reinstall", str(wheel(version, tmp_path)))
    imported = run("-c", CHECK, str(ROOT if version == "editable" else site), str(site))
    assert imported.returncode == 0, imported.stderr
    helped = run("-m", "optimum.commands.optimum_cli", "qvlm", "--version")
    assert (helped.returncode, helped.stdout.split()[0]) == (0, "qvlm"), helped.stderr
    pip("uninstall", "--yes", "qvlm_hf")
    assert set(site.rglob("*.py")) == before
    assert not [path for path in site.rglob("*") if "qvlm" in path.name]
    left = run("-m", "optimum.commands.optimum_cli", "--help")
    assert left.returncode == 0, left.stderr
    assert all((ROOT / name).is_file() for name in SOURCES)
