"""Measures of routers and experts; `diagnose` takes them on a few pairs, for the step-0 receipt and a record.

Measured in each MoE layer:
    function_drift    relative L2 error of its output against the dense FFN's on the same input
    expert_cosine     mean pairwise cosine of the experts' flattened parameters
    expert_distance   mean pairwise relative distance of the same
    router_entropy    mean entropy of the router's full softmax in nats; ln E is uniform
    load              the share of the (token, choice) pairs that each expert gets, before capacity
And in each tower: the mean cosine of its features with the dense model's, and their relative L2 error.

Retrieval among these pairs, by the model and by the dense one, is no zero-shot score: they are training pairs. It shows
what initialisation or training changed, and looks at no evaluation data.

Source: the metrics of arXiv:2604.13508, section 4.5. Shape suffixes: P parameters of an expert.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcycle_bench.model.ffn import merged
from upcycle_bench.model.moe import MoEFFN, moe_layers


@torch.no_grad()
def diagnose(model: Any, dense: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Compare `model` with `dense` on batches of (images [B, 3, H, W], texts [B, L]); both are put into eval mode."""
    model.eval()
    dense.eval()
    layers = moe_layers(model)
    seen = {name: _LayerStatistics(layer, dense.get_submodule(layer.place.mlp_path)) for name, layer in layers.items()}
    handles = [layers[name].moe.register_forward_hook(statistics.observe) for name, statistics in seen.items()]
    ours: dict[str, list[Tensor]] = defaultdict(list)
    theirs: dict[str, list[Tensor]] = defaultdict(list)
    try:
        for images, texts in batches:
            for tower, encode, inputs in (("vision", "encode_image", images), ("text", "encode_text", texts)):
                ours[tower].append(getattr(model, encode)(inputs).float())
                theirs[tower].append(getattr(dense, encode)(inputs).float())
    finally:
        for handle in handles:
            handle.remove()
    model_BC, dense_BC = ({tower: torch.cat(parts) for tower, parts in each.items()} for each in (ours, theirs))
    return {
        "feature_cosine_with_dense": {
            tower: float(F.cosine_similarity(model_BC[tower], dense_BC[tower], dim=-1).mean()) for tower in model_BC
        },
        "feature_drift": {
            tower: float((model_BC[tower] - dense_BC[tower]).norm() / dense_BC[tower].norm()) for tower in model_BC
        },
        "training_pair_retrieval": {
            "pairs": len(model_BC["vision"]),
            "chance_log_likelihood": -math.log(len(model_BC["vision"])),
            "model": pair_retrieval(model_BC["vision"], model_BC["text"], model.logit_scale.exp()),
            "dense": pair_retrieval(dense_BC["vision"], dense_BC["text"], dense.logit_scale.exp()),
        },
        "layers": {name: statistics.summary() for name, statistics in seen.items()},
    }


class _LayerStatistics:
    """Running sums over the tokens of one MoE layer."""

    def __init__(self, layer: MoEFFN, ffn: nn.Module) -> None:
        self.layer, self.ffn = layer, ffn
        self.tokens, self.entropy, self.error, self.energy = 0, 0.0, 0.0, 0.0
        self.load_E = torch.zeros(layer.place.num_experts)

    def observe(self, _module: nn.Module, args: tuple[Tensor, ...], output: tuple[Any, ...]) -> None:
        """Add a batch, as a forward hook of `MoEFFN.moe`."""
        x_TD, y_TD = args[0], output[0]
        target_TD = self.ffn(x_TD)
        probs_TE = router_probabilities(self.layer.router_weight, x_TD)
        self.tokens += len(x_TD)
        self.entropy += float(-torch.special.xlogy(probs_TE, probs_TE).sum())
        self.error += float((y_TD - target_TD).float().square().sum())
        self.energy += float(target_TD.float().square().sum())
        self.load_E += output[2].float().cpu()

    def summary(self) -> dict[str, Any]:
        """The layer's part of the report."""
        share_E = self.load_E / self.load_E.sum()
        return {
            # An FFN of zeros, as in a block that was added: any output is as far from it as can be.
            "function_drift": (self.error / self.energy) ** 0.5 if self.energy else float(self.error > 0),
            "expert_cosine": expert_cosine(self.layer.experts),
            "expert_distance": expert_distance(self.layer.experts),
            "router_entropy": self.entropy / self.tokens,
            "load": [round(share, 6) for share in share_E.tolist()],
        }


def pair_retrieval(image_BC: Tensor, text_BC: Tensor, scale: Tensor) -> dict[str, float]:
    """Each image among all texts and each text among all images, at the model's own logit scale; mean of both ways.

    log_likelihood: of the right partner, under the softmax; recall@1. A caption that occurs twice counts as wrong
    where it is another pair's.
    """
    logits_BB = scale * F.normalize(image_BC, dim=1) @ F.normalize(text_BC, dim=1).T
    right_B = torch.arange(len(logits_BB), device=logits_BB.device)
    ways = (logits_BB, logits_BB.T)
    return {
        "log_likelihood": -float(sum(F.cross_entropy(way, right_B) for way in ways)) / 2,
        "recall@1": float(sum((way.argmax(1) == right_B).float().mean() for way in ways)) / 2,
    }


def router_probabilities(router_ED: Tensor, x_TD: Tensor) -> Tensor:
    """The router's full softmax (arXiv:2604.13508, Eq. 3), [T, E], in float32 or wider."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return torch.softmax(x_TD.to(dtype) @ router_ED.to(dtype).T, dim=1)


def expert_cosine(experts: Iterable[nn.Module]) -> float:
    """Mean pairwise cosine of flattened (merged) expert parameters; 1 for identical experts."""
    unit_EP = F.normalize(torch.stack(_flat(experts)).double(), dim=1)
    count = len(unit_EP)
    return float((unit_EP.sum(0).square().sum() - count) / (count * (count - 1)))


def expert_distance(experts: Iterable[nn.Module]) -> float:
    """Mean over pairs of |a - b| / sqrt((|a|^2 + |b|^2) / 2); 0 for identical experts, sqrt(2) for unrelated ones."""
    distances = [
        (a_P - b_P).double().norm() / ((a_P.double().square().sum() + b_P.double().square().sum()) / 2).sqrt()
        for a_P, b_P in itertools.combinations(_flat(experts), 2)
    ]
    return float(torch.stack(distances).mean())


def _flat(experts: Iterable[nn.Module]) -> list[Tensor]:
    """The parameters of each expert's plain FFN in a row, [P]."""
    plain = [merged(expert) for expert in experts]
    return [torch.cat([p.detach().flatten() for p in expert.parameters()]) for expert in plain]


@torch.no_grad()
def relative_compactness(out_RD: Sequence[Tensor]) -> float | None:
    """Tr(S_W pinv(S_B)) / E of the experts' outputs, one [R, D] each; None where the means of experts coincide.

    S_W is the covariance within experts, pooled over all rows. S_B is that of the E experts' mean outputs, of rank at
    most E - 1. Lower: the variance inside experts lies in other directions than their means. The paper does not print
    its formula; this reading of its text is neural collapse's NC1 (reconstructed). Experts without rows are left out.

    Shape suffixes: A axes, the directions in which the means of experts differ.
    """
    rows = [rows_RD.double() for rows_RD in out_RD if len(rows_RD)]
    means_ED = torch.stack([rows_RD.mean(0) for rows_RD in rows])
    if (between := _between(means_ED)) is None:
        return None
    axes_AD, spread_A = between
    along_RA = torch.cat([(own_RD - mean_D) @ axes_AD.T for own_RD, mean_D in zip(rows, means_ED, strict=True)])
    return float((along_RA.square().mean(0) / spread_A).sum() / len(rows))


def compactness_of_moments(rows_E: Tensor, sum_ED: Tensor, second_DD: Tensor) -> float | None:
    """`relative_compactness` from sums that can be added up batch by batch, in float64.

    They are the rows of each expert, the sum of its outputs, and the sum of x x^T over all outputs x.
    """
    used = rows_E > 0
    means_ED = sum_ED[used] / rows_E[used, None]
    if (between := _between(means_ED)) is None:
        return None
    axes_AD, spread_A = between
    within_DD = (second_DD - (means_ED * rows_E[used, None]).T @ means_ED) / rows_E.sum()  # S_W
    return float(((axes_AD @ within_DD * axes_AD).sum(1) / spread_A).sum() / len(means_ED))


def _between(means_ED: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvectors [A, D] and eigenvalues [A] of S_B, those that are not zero; None if there is none."""
    apart_ED = means_ED - means_ED.mean(0)
    _, s_E, axes_ED = torch.linalg.svd(apart_ED, full_matrices=False)  # S_B = axes^T diag(s^2 / E) axes
    kept = s_E > max(float(s_E[0]) * 1e-6, float(means_ED.norm()) * 1e-12)
    kept[len(means_ED) - 1 :] = False  # centred means: one direction fewer than experts
    return (axes_ED[kept], s_E[kept].square() / len(means_ED)) if kept.any() else None
