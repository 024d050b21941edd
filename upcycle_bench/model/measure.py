"""What the experts and the router of a model do on a few pairs: the step-0 receipt and the diagnostics of a record.

Per MoE layer: function drift (relative L2 error of the layer's output against the dense FFN on the same input), mean
pairwise cosine and relative distance of the experts' flattened parameters, entropy of the full softmax of the router
in nats (ln N is uniform), and the load, the share of (token, choice) pairs per expert. Per tower: mean cosine of the
features with the dense model's, and their relative L2 error. Retrieval among these very pairs, for the model and the
dense one: they are training pairs, seen before, so it says what initialisation or training changed and is no
zero-shot score; it costs no evaluation and looks at no evaluation data. Sources: metrics of arXiv:2604.13508, section
4.5.

Shape suffixes: B batch, T tokens, D width, E embedding, N experts, K choices per token, P parameters of an expert.
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
    """Compare `model` with `dense` on (images [B, 3, H, W], texts [B, L]); both are put into eval mode."""
    model.eval()
    dense.eval()
    layers = moe_layers(model)
    seen: dict[str, _Layer] = {
        name: _Layer(layer, dense.get_submodule(layer.place.mlp_path)) for name, layer in layers.items()
    }
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
    model_BE, dense_BE = ({tower: torch.cat(parts) for tower, parts in each.items()} for each in (ours, theirs))
    return {
        "feature_cosine_with_dense": {
            tower: float(F.cosine_similarity(model_BE[tower], dense_BE[tower], dim=-1).mean()) for tower in model_BE
        },
        "feature_drift": {
            tower: float((model_BE[tower] - dense_BE[tower]).norm() / dense_BE[tower].norm()) for tower in model_BE
        },
        "training_pair_retrieval": {
            "pairs": len(model_BE["vision"]),
            "chance_log_likelihood": -math.log(len(model_BE["vision"])),
            "model": pair_retrieval(model_BE["vision"], model_BE["text"], model.logit_scale.exp()),
            "dense": pair_retrieval(dense_BE["vision"], dense_BE["text"], dense.logit_scale.exp()),
        },
        "layers": {name: statistics.summary() for name, statistics in seen.items()},
    }


def pair_retrieval(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> dict[str, float]:
    """Each image among all texts and each text among all images, at the model's own logit scale; mean of both ways.

    log_likelihood: of the right partner, under the softmax; recall@1. A caption that occurs twice counts as wrong
    where it is another pair's.
    """
    logits_BB = scale * F.normalize(image_BE, dim=1) @ F.normalize(text_BE, dim=1).T
    right_B = torch.arange(len(logits_BB), device=logits_BB.device)
    ways = (logits_BB, logits_BB.T)
    return {
        "log_likelihood": -float(sum(F.cross_entropy(way, right_B) for way in ways)) / 2,
        "recall@1": float(sum((way.argmax(1) == right_B).float().mean() for way in ways)) / 2,
    }


class _Layer:
    """Running statistics of one MoE layer."""

    def __init__(self, layer: MoEFFN, ffn: nn.Module) -> None:
        self.layer, self.ffn = layer, ffn
        self.tokens, self.entropy, self.error, self.energy = 0, 0.0, 0.0, 0.0
        self.load_N = torch.zeros(layer.place.num_experts)

    def observe(self, _module: nn.Module, args: tuple[Tensor, ...], output: tuple[Any, ...]) -> None:
        x_TD, y_TD = args[0], output[0]
        target_TD = self.ffn(x_TD)
        probs_TN = F.softmax(self.layer.gate.wg(x_TD).float(), dim=1)
        self.tokens += len(x_TD)
        self.entropy += float(-torch.special.xlogy(probs_TN, probs_TN).sum())
        self.error += float((y_TD - target_TD).float().square().sum())
        self.energy += float(target_TD.float().square().sum())
        self.load_N += output[2].float().cpu()

    def summary(self) -> dict[str, Any]:
        share_N = self.load_N / self.load_N.sum()
        return {
            "function_drift": (self.error / self.energy) ** 0.5,
            "expert_cosine": expert_cosine(self.layer.experts),
            "expert_distance": expert_distance(self.layer.experts),
            "router_entropy": self.entropy / self.tokens,
            "load": [round(share, 6) for share in share_N.tolist()],
        }


def expert_cosine(experts: Iterable[nn.Module]) -> float:
    """Mean pairwise cosine of flattened (merged) expert parameters; 1 for identical experts."""
    unit_NP = F.normalize(torch.stack(_flat(experts)).double(), dim=1)
    count = len(unit_NP)
    return float((unit_NP.sum(0).square().sum() - count) / (count * (count - 1)))


def expert_distance(experts: Iterable[nn.Module]) -> float:
    """Mean over pairs of |a - b| / sqrt((|a|^2 + |b|^2) / 2); 0 for identical experts, sqrt(2) for unrelated ones."""
    distances = [
        (a_P - b_P).double().norm() / ((a_P.double().square().sum() + b_P.double().square().sum()) / 2).sqrt()
        for a_P, b_P in itertools.combinations(_flat(experts), 2)
    ]
    return float(torch.stack(distances).mean())


def _flat(experts: Iterable[nn.Module]) -> list[Tensor]:
    plain = [merged(expert) for expert in experts]
    return [torch.cat([p.detach().flatten() for p in expert.parameters()]) for expert in plain]


@torch.no_grad()
def relative_compactness(out_RD: Sequence[Tensor]) -> float | None:
    """Tr(S_W pinv(S_B)) / N of the experts' outputs, one [R, D] each; None where the means of experts coincide.

    S_W is the covariance within experts, pooled over all rows; S_B that of the N experts' mean outputs, of rank at most
    N - 1. Lower: the variance inside experts lies in other directions than their means. The paper's formula is not
    printed; this reading of its text is neural collapse's NC1 (reconstructed). Experts without rows are left out.
    """
    rows = [rows_RD.double() for rows_RD in out_RD if len(rows_RD)]
    means_ND = torch.stack([rows_RD.mean(0) for rows_RD in rows])
    if (between := _between(means_ND)) is None:
        return None
    axes_AD, spread_A = between
    along_RA = torch.cat([(own_RD - mean_D) @ axes_AD.T for own_RD, mean_D in zip(rows, means_ND, strict=True)])
    return float((along_RA.square().mean(0) / spread_A).sum() / len(rows))


def compactness_of_moments(rows_N: Tensor, sum_ND: Tensor, second_DD: Tensor) -> float | None:
    """The same from what adds up batch by batch, in float64: rows and sums per expert, sum of x x^T over all rows."""
    used = rows_N > 0
    means_ND = sum_ND[used] / rows_N[used, None]
    if (between := _between(means_ND)) is None:
        return None
    axes_AD, spread_A = between
    within_DD = (second_DD - (means_ND * rows_N[used, None]).T @ means_ND) / rows_N.sum()
    return float(((axes_AD @ within_DD * axes_AD).sum(1) / spread_A).sum() / len(means_ND))


def _between(means_ND: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvectors [A, D] and eigenvalues [A] of S_B, those that are not zero; None if there is none."""
    apart_ND = means_ND - means_ND.mean(0)
    _, s_N, axes_ND = torch.linalg.svd(apart_ND, full_matrices=False)  # S_B = axes^T diag(s^2 / N) axes
    kept = s_N > max(float(s_N[0]) * 1e-6, float(means_ND.norm()) * 1e-12)
    kept[len(means_ND) - 1 :] = False  # centred means: one direction fewer than experts
    return (axes_ND[kept], s_N[kept].square() / len(means_ND)) if kept.any() else None
