"""Which values the strategies' options refuse, and what the options are when nobody sets them."""

from typing import Any

import pytest

from upcycle_bench.planning.registry import load_registry
from upcycle_bench.strategy import configure
from upcycle_bench.util.errors import UserError

STRATEGIES = load_registry().strategies
REFUSED = {
    "cluster-aware": {
        "tau": ["0", "1.5", "nan", "much"],
        "rank_floor": ["1", "-0.1"],
        "rank_fraction": ["1.1"],
        "pca": ["2"],
        "pca_divisor": ["0"],
        "router_scale": ["0", "inf"],
        "pairs": ["0", "1.5"],
        "cluster_tokens": ["0"],
        "kmeans_iterations": ["0"],
        "kmeans_restarts": ["0"],
        "eesd_weight": ["-1", "inf"],
        "eesd_ema": ["1.01"],
        "eesd_memory": ["0", "1.01", "nan"],
        "eesd_feature_reduction": ["max"],
        "eesd_layer_reduction": [""],
        "eesd_tokens": ["0", "1.5"],
        "eesd_mask_dropped": ["perhaps"],
    },
    "sparse-upcycling": {
        "expert_noise_std": ["-0.1", "inf", "nan"],
        "expert_noise_rel": ["-0.1", "inf", "nan"],
        "router_noise_std": ["-0.1", "inf", "nan"],
    },
    "drop-upcycling": {
        "ratio": ["-0.1", "1.01", "nan", "half"],
        "shared_indices": ["perhaps"],
        "bias": ["drop"],
        "router_init": ["zeros"],
    },
    "noise-upcycling": {"ratio": ["1.01", "-0.1"], "std": ["-1", "inf"]},
    "drop-svd": {"fraction": ["1.1", "nan"], "energy_fraction": ["-0.1"], "vectors": ["haar"]},
    "clip-moe": {"clusters": ["0"], "max_accumulated_stages": ["0"], "budget": ["0", "inf"], "lr_factor": ["0", "inf"]},
    "btx": {"branches": ["-1"], "epochs": ["0"], "budget": ["0", "inf"], "lr_factor": ["0", "inf"]},
    "ders-lm": {"rank": ["0", "2.5"], "router_init": ["zeros"]},
    "ders-sm": {"rate": ["1", "-0.1", "nan"], "bias_deltas": ["perhaps"]},
    "spri": {
        "rank_fraction": ["1.1", "nan"],
        "scale": ["0", "inf"],
        "partition": ["odd"],
        "mode": ["new"],
        "which": ["w3"],
        "stage1_fraction": ["-0.5"],
        "rank_by": ["eye"],
    },
    "virtual-group": {"granularity": ["0", "1.5", "two"], "scaling": ["half"], "router_init": ["x"]},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "drop-upcycling": {"ratio": 0.5, "shared_indices": True, "bias": "keep"},
    "noise-upcycling": {"ratio": 0.5, "std": 0.02},
    "drop-svd": {"fraction": 0.25, "energy_fraction": None, "vectors": "orthonormal"},
    "ders-lm": {"rank": 4, "bias_deltas": False},
    "ders-sm": {"rate": 0.999, "bias_deltas": False},
    "virtual-group": {"granularity": 2, "scaling": "exact"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_value_is_one_line_that_names_the_option(name: str) -> None:
    for option, values in REFUSED[name].items():
        for value in values:
            with pytest.raises(UserError, match=f"^{name}: {option}: ") as error:
                configure(STRATEGIES[name].target, {option: value})
            assert value in str(error.value)
            assert "\n" not in str(error.value)


def test_defaults_are_the_papers() -> None:
    for name, options in DEFAULTS.items():
        assert STRATEGIES[name].target().config() == {**options, "router_init": "deepspeed"}


def test_words_become_numbers_and_truth_values() -> None:
    strategy: Any = configure(STRATEGIES["drop-upcycling"].target, {"ratio": "0.25", "shared_indices": "false"})
    assert (strategy.ratio, strategy.shared_indices) == (0.25, False)
