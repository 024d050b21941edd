"""CLIP_benchmark's linear probe on the CPU, from features in memory: row 15 compares `evaluation.probe` with it.

    decay, logits_NY = linear_probe(train, validation, test, classes=100, workers=4, seed=0)

`train`, `find_peak` and `linear_probe` are clip_benchmark.metrics.linear_probe's (1.6.2, MIT licence) `train`,
`find_peak` and the part of `evaluate` after its features are there, line by line but for what needs a GPU and for what
is shown: no `.cuda()`, no DataParallel, no pinned memory, no autocast (their amp=False), no progress messages. Data
sets, learning rate, inference and accuracy are imported from there. tests/evaluation/test_probe.py compares it with
the original.

Shape suffixes: N samples, Y classes.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from clip_benchmark.metrics.linear_probe import FeatureDataset, accuracy, cosine_lr, infer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from upcycle_bench.evaluation.probe import Examples

WORKERS, BATCH_SIZE, LEARNING_RATE, EPOCHS = 4, 64, 0.1, 10  # the defaults of its command


def train(
    dataloader: DataLoader[tuple[Tensor, Tensor]],
    input_shape: int,
    output_shape: int,
    weight_decay: float,
    lr: float,
    epochs: int,
    seed: int,
) -> nn.Module:
    """One training, as theirs."""
    torch.manual_seed(seed)
    model = nn.Linear(input_shape, output_shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    criterion = nn.CrossEntropyLoss()
    len_loader = len(dataloader)
    scheduler = cosine_lr(optimizer, lr, 0.0, epochs * len_loader)
    for epoch in range(epochs):
        for i, (x, y) in enumerate(dataloader):
            scheduler(i + epoch * len_loader)
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
    return model


def find_peak(
    wd_list: Sequence[float],
    idxs: Sequence[int],
    train_loader: DataLoader[tuple[Tensor, Tensor]],
    val_loader: DataLoader[tuple[Tensor, Tensor]],
    input_shape: int,
    output_shape: int,
    lr: float,
    epochs: int,
    seed: int,
) -> int:
    """The best of these weight decays on validation, as theirs."""
    best_wd_idx, max_acc = 0, 0.0
    for idx in idxs:
        model = train(train_loader, input_shape, output_shape, wd_list[idx], lr, epochs, seed)
        logits, target = infer(model, val_loader, False, "cpu")
        (acc1,) = accuracy(logits.float(), target.float(), topk=(1,))
        if max_acc < acc1:
            best_wd_idx, max_acc = idx, acc1
    return best_wd_idx


def linear_probe(
    train_examples: Examples,
    validation: Examples,
    test: Examples,
    classes: int,
    *,
    workers: int = WORKERS,
    seed: int = 0,
    lr: float = LEARNING_RATE,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
) -> tuple[float, Tensor]:
    """(the chosen weight decay, logits [N, C] of `test` in its order), trained anew on training and validation."""
    both = train_examples.and_also(validation)
    train_loader, val_loader, train_val_loader = (
        DataLoader(
            FeatureDataset(part.features_NC, part.label_N), batch_size=batch_size, shuffle=True, num_workers=workers
        )
        for part in (train_examples, validation, both)
    )
    # theirs shuffles the test samples too, which changes no accuracy
    test_loader = DataLoader(FeatureDataset(test.features_NC, test.label_N), batch_size=batch_size, num_workers=workers)
    shape = train_examples.features_NC.shape[1], classes
    wd_list = np.logspace(-6, 2, num=97).tolist()
    wd_list_init = np.logspace(-6, 2, num=7).tolist()
    wd_init_idx = [i for i, val in enumerate(wd_list) if val in wd_list_init]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # infer's progress bars
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores
        peak_idx = find_peak(wd_list, wd_init_idx, train_loader, val_loader, *shape, lr, epochs, seed)
        step_span = 8
        while step_span > 0:
            left, right = max(peak_idx - step_span, 0), min(peak_idx + step_span, len(wd_list) - 1)
            asked = [left, peak_idx, right]
            peak_idx = find_peak(wd_list, asked, train_loader, val_loader, *shape, lr, epochs, seed)
            step_span //= 2
        final_model = train(train_val_loader, *shape, wd_list[peak_idx], lr, epochs, seed)
        logits, _ = infer(final_model, test_loader, False, "cpu")
    return wd_list[peak_idx], logits
