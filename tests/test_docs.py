"""Documentation that cannot rot: generated parts are fresh, examples run, named files and commands exist."""

import re
import sys
import types
from pathlib import Path

import pytest
import typer

from tests.generate_docs import DOCUMENTS as GENERATED
from tests.generate_docs import MARK, PARTS, ROOT, generate
from upcycle_bench.cli import app
from upcycle_bench.registry import load_registry

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_generated_parts_are_fresh() -> None:
    texts = [document.read_text() for document in GENERATED]
    assert {match[1] for text in texts for match in MARK.finditer(text)} == set(PARTS)
    assert [generate(text) for text in texts] == texts, "run `make docs`"


def test_the_readmes_leaderboard_has_every_strategy_with_two_seeds() -> None:
    rows = PARTS["leaderboard"]()
    for name in ("cluster-aware", "sparse-upcycling", "dense", "dense-frozen"):
        assert name in rows


def test_the_readmes_example_strategy_works() -> None:
    """The code block is executed, registered and asked for experts."""
    (code,) = re.findall(r"```python\n# my_idea\.py\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    module = types.ModuleType("my_idea")
    sys.modules["my_idea"] = module
    try:
        exec(code, module.__dict__)
        entry = load_registry({"my-package": module}).get("strategy", "my-idea")
    finally:
        del sys.modules["my_idea"]
    from tests.helpers import initialise, tiny_clip

    inits = initialise(entry.target(spread=0.1), tiny_clip(), seed=0).inits
    first, second = (inits["vision.1"].experts[n].c_fc.weight for n in (0, 1))
    assert not first.equal(second)


def test_the_api_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code blocks, one after the other, with the smallest model of ours in the place of ViT-B-32."""
    from tests.helpers import MODEL, threads, tiny_batches, tiny_clip

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    size = tiny_batches(tiny_clip(), pairs=16)[0][0].shape[-1]
    with threads(1):
        for block in blocks:
            exec(block.replace("ViT-B-32", MODEL).replace("224", str(size)), names)
    assert len(blocks) == 3
    assert names["clip"].name == MODEL  # type: ignore[attr-defined]
    assert all(p.grad is not None for p in names["model"].parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_commands_and_options_exist(document: Path) -> None:
    text = document.read_text()
    for path in re.findall(r"`((?:upcycle_bench|strategies|suites|tests|docs)/[\w/.]+?)`", text):
        assert (ROOT / path).exists(), path
    group = typer.main.get_command(app)
    options = {opt for option in group.commands["run"].params for opt in option.opts}  # type: ignore[attr-defined]
    for line in re.findall(r"upcycle-bench (.+)", text):
        words = line.split("#")[0].replace("`", " ").split()
        if words and words[0] == "run":
            used = {word.rstrip(".,;") for word in words if word.startswith("-")}
            assert used <= options | {"--help", "--json"}, line


def test_make_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        assert set(re.findall(r"make (run|test|lint|docs|clean|bench|scaling)\b", document.read_text())) <= targets


def test_the_version_is_the_same_everywhere() -> None:
    from upcycle_bench import __version__

    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text()


def test_ci_runs_the_readmes_commands() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make lint", "make test"]
