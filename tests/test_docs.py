"""Documentation that cannot rot: generated parts are fresh, examples run, named files and commands exist."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import typer

from tests.generate_docs import DOCUMENTS as GENERATED
from tests.generate_docs import FIGURE, MARK, PARTS, ROOT, caption, draw, generate
from upcycle_bench import record
from upcycle_bench.cli import app
from upcycle_bench.planning.plan import make_plan
from upcycle_bench.planning.registry import Registry, load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.run import run
from upcycle_bench.util.progress import Reporter

DOCS = ROOT / "docs"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md")),
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "upcycle_bench").rglob("*.md")),
]
MEASURED = re.compile(r"<!-- measured: \S+ -->\n.*?<!-- end -->", re.DOTALL)
IMPORTS = re.compile(r"^(?:from|import) (upcycle_bench[\w.]*)", re.MULTILINE)

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(document: Path, language: str = "python") -> list[str]:
    """The code blocks of one language, in their order."""
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)


def test_generated_parts_are_fresh() -> None:
    texts = [document.read_text() for document in GENERATED]
    assert {match[1] for text in texts for match in MARK.finditer(text)} == set(PARTS)
    assert [generate(text) for text in texts] == texts, "run `make docs`"


def test_the_picture_shows_the_records(tmp_path: Path) -> None:
    """The picture says what it shows; matplotlib's own version may move its strokes."""
    draw(tmp_path / "again.svg")
    assert caption() in (tmp_path / "again.svg").read_text()
    assert caption() in FIGURE.read_text(), "run `make docs`"
    assert f"]({FIGURE.relative_to(ROOT)})" in (ROOT / "README.md").read_text()


def test_the_readme_is_short_and_names_every_strategy() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert all(f"`{name}`" in PARTS["names"]() for name in load_registry().strategies)
    for name in ("sparse-upcycling", "dense (control)", "dense-frozen (control)"):
        assert f"| {name}" in PARTS["results"]()


def plugin(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Registry, str]:
    """The block as the file that its first line names, imported from `folder` and registered; its module's name."""
    (file,) = re.findall(r"\A# (\w+)\.py\n", code)
    assert {*IMPORTS.findall(code)} <= {"upcycle_bench.hookspecs", "upcycle_bench.strategy", "upcycle_bench.suite"}
    (folder / f"{file}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    sys.modules.pop(file, None)
    return load_registry({file: importlib.import_module(file)}), file


STRATEGIES = blocks(DOCS / "add-a-strategy.md")


def test_the_readmes_strategy_is_the_first_of_its_page() -> None:
    assert blocks(ROOT / "README.md") == STRATEGIES[:1]


@pytest.mark.parametrize("place", range(len(STRATEGIES)))
def test_strategies_of_the_documents_run(
    place: int, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, file = plugin(STRATEGIES[place], tmp_path, monkeypatch)
    ((name, entry),) = [item for item in registry.strategies.items() if item[1].owner == file]
    planned = make_plan(registry, name, load_protocol(registry.protocols["smoke"].target, quick))
    made = record.read(run(planned, tmp_path / "results", Reporter()))
    assert (made.status, made.strategy.name, made.strategy.status) == ("ok", name, "unpublished")
    assert made.receipt["layers"]["vision.1"]["expert_cosine"] == pytest.approx(1, abs=0.01)
    shares = made.diagnostics["loss_shares_at_start"]
    assert (0 < shares.get("router-z", 0) < 0.5) == ("ExtraLoss" in STRATEGIES[place])
    assert (name == "token-router") == (entry.target().calibration_pairs > 0)


def test_the_suite_of_the_documents_runs(quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its page says: smoke's protocol under another name, with the table of the page."""
    document = DOCS / "add-a-suite.md"
    (code,), (settings,) = blocks(document), blocks(document, "toml")
    smoke = load_registry().protocols["smoke"].target.read_text()
    (tmp_path / "my-smoke.toml").write_text(f"{smoke}\n{settings}")
    registry, _ = plugin(code, tmp_path, monkeypatch)
    protocol = load_protocol(registry.get("protocol", "my-smoke").target, quick)
    planned = make_plan(registry, "dense-frozen", protocol, suites=["class-names"])
    made = record.read(run(planned, tmp_path / "results", Reporter()))
    (score,) = made.scores
    assert (made.status, score.suite, score.dataset) == ("ok", "class-names", "digits-test")
    assert (score.samples, score.chance) == (10, 0.1)
    assert score.value > score.chance


def test_the_api_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code blocks, one after the other, with the smallest model of ours in the place of ViT-B-32."""
    from tests.helpers import MODEL, threads, tiny_batches, tiny_clip

    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    size = tiny_batches(tiny_clip(), pairs=16)[0][0].shape[-1]
    with threads(1):
        for block in blocks(DOCS / "api.md"):
            exec(block.replace("ViT-B-32", MODEL).replace("224", str(size)), names)
    assert len(blocks(DOCS / "api.md")) == 3
    assert names["clip"].name == MODEL  # type: ignore[attr-defined]
    assert all(p.grad is not None for p in names["model"].parameters())  # type: ignore[attr-defined]


@each_document
def test_lines_are_short(document: Path) -> None:
    """160 characters; a row of a table that a program writes cannot be broken."""
    text = MARK.sub(lambda part: re.sub(r"^\|.*", "", part[0], flags=re.MULTILINE), document.read_text())
    long = [line for line in MEASURED.sub("", text).splitlines() if len(line) > 160]
    assert not long


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


@each_document
def test_named_files_commands_and_options_exist(document: Path) -> None:
    text = document.read_text()
    if "notes" not in document.parts and document.name != "CHANGELOG.md":  # these speak of what was
        for path in re.findall(r"`((?:upcycle_bench|strategies|suites|tests|docs)/[\w/.]+?)`", text):
            assert (ROOT / path).exists(), path
    group = typer.main.get_command(app)
    options = {opt for option in group.commands["run"].params for opt in option.opts}  # type: ignore[attr-defined]
    for line in re.findall(r"upcycle-bench (.+)", text):
        words = line.split("#")[0].replace("`", " ").split()
        if words and words[0] == "run":
            used = {word.rstrip(".,;") for word in words if word.startswith("-")}
            assert used <= options | {"--help", "--json"}, line


def test_every_goal_that_is_missed_has_its_reason() -> None:
    """Rows of the bench that say `no` stand in the table of reasons, by their number."""
    text = (DOCS / "performance.md").read_text()
    (measured,) = [part for part in MEASURED.findall(text) if "measured: bench" in part]
    missed = {row.split(" | ")[0] for row in measured.splitlines() if row.endswith("| no |")}
    reasons = text.partition("## Slower than the goal")[2].partition("\n## ")[0]
    assert missed <= {row.split(" | ")[0] for row in reasons.splitlines() if row.startswith("| ")}


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
