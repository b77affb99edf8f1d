"""What is in the wheel, in the source distribution and in an editable installation, built as pip builds them."""

import email.message
import os
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import recurrent_gemma_hf

pytest.importorskip("hatchling", reason="install this package with its `test` extra")
pytest.importorskip("editables", reason="install this package with its `test` extra")

ROOT = Path(__file__).parents[1]
# The folders that the tests, the linter and the documentation need.
FOLDERS = ".ci benchmarks conversion docs examples model_cards research src tests".split()
FILES = {
    *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"),
    *("constraints.txt", "constraints-oldest.txt", "constraints-vllm.txt"),
}
LEFT_BEHIND = {"__pycache__", ".pytest_cache", ".hypothesis", ".mypy_cache", ".ruff_cache", "wheels"}

BUILD = """
import os, sys
from hatchling import build
for kind in ("wheel", "sdist", "editable"):
    folder = os.path.join(sys.argv[1], kind)
    os.mkdir(folder)
    getattr(build, f"build_{kind}")(folder)
"""


def files_of(folder: str) -> set[str]:
    """The files of a folder of the repository, without what tools leave behind: paths from its top."""
    found = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in found if not LEFT_BEHIND & set(path.parts)}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    done = subprocess.run([sys.executable, "-c", BUILD, folder], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = (built / "wheel").iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


def metadata(archive: zipfile.ZipFile) -> email.message.Message:
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(archive.read(name))


def without_metadata(archive: zipfile.ZipFile) -> set[str]:
    return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_the_package_and_the_model_cards_and_nothing_else(wheel: zipfile.ZipFile):
    package = {path.removeprefix("src/") for path in files_of("src")}
    cards = {f"recurrent_gemma_hf/conversion/{path}" for path in files_of("model_cards")}
    assert without_metadata(wheel) == package | cards
    for path in ("py.typed", "demo/model.safetensors", "conversion/convert.py", "vllm/plugin.py", "cli/convert.py"):
        assert f"recurrent_gemma_hf/{path}" in package
    assert "recurrent_gemma_hf/conversion/model_cards/converted.md" in cards


def test_the_wheel_has_the_version_of_the_package_and_its_command(wheel: zipfile.ZipFile):
    assert metadata(wheel)["Version"] == recurrent_gemma_hf.__version__
    assert metadata(wheel)["Author"] == "The recurrent_gemma_hf maintainers"
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert b"recurrent-gemma = recurrent_gemma_hf.cli.app:main" in wheel.read(name)


WRITES_A_CARD = """
import json, sys
from pathlib import Path
import recurrent_gemma_hf, torch
from recurrent_gemma_hf.conversion.cards import CARDS, write_card
from safetensors.torch import save_file
config = recurrent_gemma_hf.RecurrentGemmaConfig.from_preset("recurrentgemma-2b").to_dict()
Path("config.json").write_text(json.dumps(config))
save_file({"a": torch.zeros(1)}, "model.safetensors")
write_card("recurrentgemma-2b-it", Path(), "2b-it")
print(recurrent_gemma_hf.__file__, CARDS, sep="\\n")
"""


def test_the_converter_in_the_wheel_finds_its_cards(wheel: zipfile.ZipFile, tmp_path: Path):
    wheel.extractall(tmp_path / "site")
    (tmp_path / "out").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", WRITES_A_CARD], cwd=tmp_path / "out", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    package = tmp_path / "site/recurrent_gemma_hf"
    assert done.stdout.splitlines() == [str(package / "__init__.py"), str(package / "conversion/model_cards")]
    assert "# RecurrentGemma 2B IT" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_the_source_distribution_holds_what_its_tests_need(built: Path):
    (path,) = (built / "sdist").iterdir()
    with tarfile.open(path) as archive:
        found = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert found - {".gitignore", "PKG-INFO"} == FILES.union(*map(files_of, FOLDERS))


def test_an_editable_installation_puts_no_folder_beside_the_package(built: Path):
    """A folder of this name without code would be imported, empty, where the clone is moved."""
    (path,) = (built / "editable").iterdir()
    with zipfile.ZipFile(path) as archive:
        (link,) = without_metadata(archive)
        assert link.endswith(".pth")
        assert archive.read(link).decode().split() == [str(ROOT / "src")]
        assert metadata(archive)["Version"] == recurrent_gemma_hf.__version__
