"""With the network cut: all that is shipped works, and what is not says in one line, soon, what to fetch."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from tests.cli.test_main import call
from tests.helpers import MODEL, tiny_clip
from upcycle_bench.model import hub
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.pretrained import find_pretrained
from upcycle_bench.util.errors import UserError

SOON = 3.0  # seconds; Hugging Face's libraries alone take 47


@pytest.fixture(autouse=True)
def _cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name is found and no connection made; nothing tells the libraries so."""

    def fail(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(hub, "PATIENCE", 2.0)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    path = tmp_path / "dense.pt"
    torch.save(tiny_clip().model.state_dict(), path)
    return path


# ---- what is shipped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["list", "strategies"],
        ["list", "suites"],
        ["list", "protocols", "--json"],
        ["schema"],
        ["receipt", "-s", "sparse-upcycling", "-p", "smoke"],
        ["run", "-s", "sparse-upcycling", "-p", "smoke", "--dry-run"],
    ],
    ids=" ".join,
)
def test_commands_need_no_network(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick_flags: list[str]
) -> None:
    assert call(monkeypatch, *command, *(quick_flags if "smoke" in command else [])) == 0
    assert capsys.readouterr().out


def test_doctor_needs_no_network(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch, "doctor", "--json")
    assert json.loads(capsys.readouterr().out)["checks"]


def test_a_run_an_upcycling_and_an_evaluation_need_no_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dense: Path, quick_flags: list[str]
) -> None:
    results = ["--results", str(tmp_path / "results")]
    assert call(monkeypatch, "run", "-s", "sparse-upcycling", "-p", "smoke", *quick_flags, *results) == 0
    output = tmp_path / "moe.safetensors"
    upcycle = ["upcycle", "-m", MODEL, "--pretrained", str(dense), "-s", "sparse-upcycling", "--output", str(output)]
    assert call(monkeypatch, *upcycle) == 0
    assert call(monkeypatch, "evaluate", str(output), "-p", "smoke") == 0
    assert call(monkeypatch, "latency", str(output), "--repeats", "1") == 0


# ---- what is not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what", "repository"),
    [
        ("ViT-H-14-CLIPA", "the tokenizer of ViT-H-14-CLIPA", "bert-base-uncased"),
        ("ViT-B-16-SigLIP", "the tokenizer of ViT-B-16-SigLIP", "timm/ViT-B-16-SigLIP"),
        ("roberta-ViT-B-32", "the configuration of roberta-ViT-B-32's text tower", "roberta-base"),
    ],
)
def test_a_model_with_a_foreign_tokenizer_names_its_repository_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str, repository: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    began = time.perf_counter()
    with pytest.raises(UserError) as raised:
        create_clip(name, tmp_path / "no such file")
    assert time.perf_counter() - began < SOON + 7  # the first also imports transformers
    line = str(raised.value)
    assert (
        line.startswith(f"cannot fetch {what} (huggingface.co: Name or service not known): run ") and "\n" not in line
    )
    assert f"`hf download {repository}`" in line


@pytest.mark.parametrize(
    ("name", "tag", "remedy"),
    [
        ("ViT-B-32", "laion2b_s34b_b79k", "run `hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K` where"),
        ("ViT-B-32-quickgelu", "openai", "run `hf download timm/vit_base_patch32_clip_224.openai` where"),
        (MODEL, "by_url", "download https://example.org/weights.pt where there is a network, and give the file"),
    ],
)
def test_a_tag_says_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tag: str, remedy: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    create_clip(MODEL)  # it registers the name with open_clip
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, MODEL, {"by_url": {"url": "https://example.org/weights.pt"}})
    began = time.perf_counter()
    with pytest.raises(UserError, match=f"cannot fetch the {tag} weights of {name} ") as raised:
        find_pretrained(name, tag)
    assert time.perf_counter() - began < SOON
    assert remedy in str(raised.value) and "\n" not in str(raised.value)


def test_the_command_is_one_line_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, dense: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    upcycle = ["upcycle", "-m", "ViT-H-14-CLIPA", "--pretrained", str(dense), "-s", "sparse-upcycling"]
    assert call(monkeypatch, *upcycle, "--output", str(tmp_path / "moe.safetensors")) == 2
    said = capsys.readouterr().err
    *before_it, line = said.splitlines()  # a file of CLIPA's does not say its pixels, which is told first
    assert line.startswith("error: cannot fetch the tokenizer of ViT-H-14-CLIPA") and "Traceback" not in said
    assert not any("error" in each for each in before_it)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_host_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any, **__: Any) -> Any:
        time.sleep(4)
        raise socket.gaierror(-2, "too late")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    began = time.perf_counter()
    assert hub.unreachable("https://huggingface.co") == "huggingface.co: no answer within 0.2 seconds"
    assert time.perf_counter() - began < SOON


def test_the_way_goes_by_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert hub.unreachable("https://huggingface.co") == "proxy.example: Name or service not known"


# ---- what was fetched beforehand -------------------------------------------------------------------------------------

CACHED = """
import json, os, socket, sys
from pathlib import Path

snapshot = Path(os.environ["HF_HOME"]) / "hub" / "models--bert-base-uncased" / "snapshots" / ("0" * 40)
snapshot.mkdir(parents=True)
(snapshot.parents[1] / "refs").mkdir()
(snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
from tokenizers import Tokenizer, models, pre_tokenizers
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]
Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "[UNK]")).save(
    str(snapshot / "tokenizer.json"))
(snapshot / "vocab.txt").write_text("\\n".join(words))
(snapshot / "config.json").write_text('{"model_type": "bert"}')
(snapshot / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
def fail(*_, **__):
    raise socket.gaierror(-2, "no network")
from upcycle_bench.model.config import model_config
from upcycle_bench.model.config import model_config
from upcycle_bench.model.hub import tokenizer_of
print(tokenizer_of("ViT-H-14-CLIPA", model_config("ViT-H-14-CLIPA"))(["a cat"]).shape[1])
"""


def test_a_tokenizer_that_was_fetched_beforehand_needs_no_network(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CACHED],
        capture_output=True,
        text=True,
        env={**environment, "HF_HOME": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == open_clip.get_model_config("ViT-H-14-CLIPA")["text_cfg"]["context_length"]
    assert "Retrying" not in done.stderr and time.perf_counter() - began < 60
