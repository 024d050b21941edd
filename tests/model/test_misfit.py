"""Weights that do not fit, each with its own remedy; every situation stands in a public bug report."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.model.checkpoints import State, prefixed, random_state, refusal
from tests.model.test_config import write
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.config import model_config
from upcycle_bench.model.repository import weights_in
from upcycle_bench.util.errors import UserError


@pytest.fixture(scope="module")
def state() -> State:
    return random_state()


def lora(state: State) -> State:
    """As PEFT saves it: a prefix, the layer within a wrapper, the adapter beside it."""
    key = "visual.transformer.resblocks.0.attn.out_proj"
    made = {name.replace(key, f"{key}.base_layer"): value for name, value in state.items()}
    made |= {f"{key}.lora_A.default.weight": torch.ones(4, 64), f"{key}.lora_B.default.weight": torch.ones(64, 4)}
    return prefixed(made, "base_model.model.")


def adapter_alone(state: State) -> State:
    key = "base_model.model.visual.transformer.resblocks.0.attn.out_proj"
    return {f"{key}.lora_A.weight": torch.ones(4, 64), f"{key}.lora_B.weight": torch.ones(64, 4)}


def gmp(state: State) -> State:
    key = "visual.transformer.resblocks.0.mlp.c_fc"
    made = {name: value for name, value in state.items() if name != f"{key}.weight"}
    weight = state[f"{key}.weight"]
    return made | {f"{key}.r": weight.norm(dim=1, keepdim=True), f"{key}.theta": weight}


def more_tokens(state: State) -> State:
    rows = state["token_embedding.weight"]
    return state | {"token_embedding.weight": torch.cat([rows, rows[:2]])}


@pytest.mark.parametrize(
    ("make", "line"),
    [
        # huggingface/transformers 20082, deepspeedai/DeepSpeed 1394
        (
            lambda state: {key: torch.empty(0) for key in state},
            "ZeRO-3 spreads them over its partitions: run zero_to",
        ),
        (lora, "weights with LoRA's beside them: merge them first (PEFT: model.merge_and_unload())"),  # peft 761
        (adapter_alone, "weights with LoRA's beside them: merge them first"),
        (gmp, "weights as length and direction (GmP): turn them back"),  # zer0int/CLIP-fine-tune 6
        (more_tokens, "more tokens than the model's vocabulary: tokens were added"),  # transformers 24650
        (  # zer0int/CLIP-fine-tune 3: as ComfyUI saves a text tower
            lambda state: {key: value for key, value in state.items() if not key.startswith("visual.")},
            "one tower alone: give the file of the whole model",
        ),
        (
            lambda state: {key: value for key, value in state.items() if key.startswith("visual.")},
            "one tower alone: give the file of the whole model",
        ),
    ],
)
def test_what_it_is_and_what_to_do(tmp_path: Path, state: State, make: Callable[[State], State], line: str) -> None:
    torch.save(make(state), tmp_path / "w.pt")
    assert line in refusal(tmp_path / "w.pt")


def test_a_logit_scale_that_is_no_logarithm(tmp_path: Path, state: State) -> None:
    """mlfoundations/open_clip 104 and 746: logarithm and factor were mistaken for each other."""
    torch.save(state | {"logit_scale": torch.tensor(100.0)}, tmp_path / "w.pt")
    assert "logit_scale is 100, which would be a factor of e^100" in refusal(tmp_path / "w.pt")


def test_a_distributed_checkpoint(tmp_path: Path, state: State) -> None:
    """pytorch/pytorch 118207: a folder of parts that torch.load does not put together."""
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(UserError, match=r"is a distributed checkpoint; make a file of it: .* dcp_to_torch"):
        weights_in(tmp_path / "dcp")
    assert "is a part of a distributed checkpoint" in refusal(tmp_path / "dcp" / "__0_0.distcp")


def test_weights_of_a_clip_under_the_name_of_another_class_are_known_by_their_shapes(tmp_path: Path) -> None:
    torch.save(create_clip("lab-vit").model.state_dict(), tmp_path / "w.pt")
    siglip = model_config("ViT-B-16-SigLIP")
    del siglip["text_cfg"]["hf_tokenizer_name"]  # which only the network has
    siglip["text_cfg"]["vocab_size"] = 49408  # of CLIP's own
    model = write(tmp_path / "siglip.json", siglip)
    assert "Its shapes are those of lab-vit: give that model." in refusal(tmp_path / "w.pt", str(model))
