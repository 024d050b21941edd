"""Without DeepSpeed: the plain layer routes as DeepSpeed's does, and a file gives the same features and scores."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import upcycle_bench
from tests.helpers import MODEL, tiny_batches, tiny_clip
from tests.model.test_moe import EXAMPLES, PROBLEMS, tokens_of
from tests.moe_helpers import create_layer, router_of, settings_of
from upcycle_bench.data.worlds import load_world
from upcycle_bench.model import deepspeed_import, plain_moe
from upcycle_bench.model.deepspeed_import import TopKGate
from upcycle_bench.model.moe import MoEFFN
from upcycle_bench.util.errors import UserError

WITHOUT = "import sys; sys.modules['deepspeed'] = None\n"  # every import of it then raises ImportError


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The code in a process of its own, without DeepSpeed and with one thread."""
    start = f"{WITHOUT}import torch; torch.set_num_threads(1)\n"
    return subprocess.run([sys.executable, "-c", start + code, *arguments], capture_output=True, text=True, timeout=300)


# ---- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drops", [False, True])
@EXAMPLES
@given(**PROBLEMS)
def test_routes_are_deepspeeds_to_the_bit(
    drops: bool, seed: int, count: int, width: int, experts: int, top_k: int, factor: float, minimum: int, tokens: str,
    router: str,
) -> None:  # fmt: skip
    """Any router and ties, from no capacity to more than enough; the single choice without drops."""
    torch.manual_seed(seed)
    top_k = min(top_k, experts)
    settings: dict[str, Any] = {"capacity_factor": factor, "min_capacity": minimum, "use_rts": False}
    stock, ours = (kind(width, experts, top_k, **settings).train() for kind in (TopKGate, plain_moe.TopKGate))
    weight = nn.Parameter(router_of(router, experts, width, torch.float32))
    for gate in (stock, ours):
        gate.wg.weight, gate.drop_tokens = weight, drops and top_k > 1
        gate.top2_2nd_expert_sampling = bool(seed % 2)
    x_TD = tokens_of(tokens, count, width, torch.float32)
    torch.manual_seed(seed)
    expected = stock(x_TD, None, True, False)
    torch.manual_seed(seed)
    for ours_part, theirs in zip(ours(x_TD), expected, strict=True):
        if isinstance(theirs, Tensor):
            assert ours_part.dtype == theirs.dtype and torch.equal(ours_part, theirs)
        else:
            assert ours_part == theirs


def test_what_needs_deepspeed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_import, "MoE", plain_moe.MoE)
    layer = create_layer(5, settings_of(3, 2), torch.float32)
    assert isinstance(layer, MoEFFN) and type(layer.moe) is plain_moe.MoE
    with pytest.raises(UserError, match="need DeepSpeed, which is not installed: pip install 'deepspeed"):
        plain_moe.MOELayer.forward(layer.moe.deepspeed_moe, torch.zeros(2, 5))


# ---- files -----------------------------------------------------------------------------------------------------------

ENCODE = """
import torch, upcycle_bench
clip = upcycle_bench.load(sys.argv[1])
given = torch.load(sys.argv[2])
with torch.no_grad():
    made = [clip.model.encode_image(given[0]), clip.model.encode_text(given[1])]
assert "deepspeed" not in [name for name, module in sys.modules.items() if module]
torch.save([*made, clip.model.state_dict()], sys.argv[3])
"""


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_the_same_features_to_the_bit(tmp_path: Path, top_k: int, dtype: torch.dtype) -> None:
    dense = tiny_clip(dtype)
    model = upcycle_bench.upcycle(dense.model, "noise-upcycling", experts=4, top_k=top_k)
    given = tiny_batches(dense, pairs=16)[0]
    upcycle_bench.save(model, tmp_path / "moe.safetensors", MODEL)
    torch.save(given, tmp_path / "given.pt")
    done = run_python(ENCODE, *(str(tmp_path / name) for name in ("moe.safetensors", "given.pt", "made.pt")))
    assert done.returncode == 0, done.stderr
    image_BC, text_BC, state = torch.load(tmp_path / "made.pt")
    with torch.no_grad():
        assert torch.equal(image_BC, model.encode_image(given[0])) and torch.equal(text_BC, model.encode_text(given[1]))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_files_written_without_deepspeed_are_read_with_it(tmp_path: Path) -> None:
    """Upcycling and saving need no DeepSpeed either, and the bytes are the same."""
    code = (
        "import upcycle_bench\nfrom tests.helpers import MODEL, tiny_clip\n"
        "model = upcycle_bench.upcycle(tiny_clip().model, 'noise-upcycling', experts=4)\n"
        "upcycle_bench.save(model, sys.argv[1], MODEL)\n"
    )
    done = run_python(code, str(tmp_path / "without.safetensors"))
    assert done.returncode == 0, done.stderr
    model = upcycle_bench.upcycle(tiny_clip().model, "noise-upcycling", experts=4)
    upcycle_bench.save(model, tmp_path / "with.safetensors", MODEL)
    assert (tmp_path / "with.safetensors").read_bytes() == (tmp_path / "without.safetensors").read_bytes()
    assert upcycle_bench.load(tmp_path / "without.safetensors").name == MODEL


CLI = "from upcycle_bench.cli import main; sys.argv = ['upcycle-bench', *sys.argv[1:]]; main()"


def test_evaluate_and_latency_work_and_run_says_what_to_install(tmp_path: Path) -> None:
    file = tmp_path / "moe.safetensors"
    upcycle_bench.save(upcycle_bench.upcycle(tiny_clip().model, "noise-upcycling", experts=4), file, MODEL)
    root = load_world("digits", 0).eval_root
    command = ["evaluate", str(file), "--data", str(root), "--suite", "zero-shot,linear-probe", "--json"]
    facts = []
    for start in ("", WITHOUT):
        code = f"import sys, torch; torch.set_num_threads(1)\n{start}{CLI}"
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        facts.append(json.loads(done.stdout))
    assert facts[0]["scores"] == facts[1]["scores"] and len(facts[0]["scores"]) > 10
    assert facts[1]["certificate"]["reloaded"]["differing"] == 0

    timed = run_python(CLI, "latency", str(file), "--repeats", "1", "--json")
    assert timed.returncode == 0, timed.stderr
    refused = run_python(CLI, "run", "-s", "sparse-upcycling", "-p", "smoke", "--results", str(tmp_path / "results"))
    assert refused.returncode == 2 and not (tmp_path / "results").exists()
    assert "error: training needs DeepSpeed (" in refused.stderr and "pip install 'deepspeed" in refused.stderr
    assert "Traceback" not in refused.stderr
