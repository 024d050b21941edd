"""What a leaderboard holds: boards of rows, a row's headline scores, and how these are written in words.

    board.rows[0].headlines["shift"].mean       # SeedMean(mean=3.6043, half_width=0.0120, n=3)
    board.rows[0].title, board.rows[0].outcome  # "cluster-aware (parts reconstructed)", "ok, 1 failed"

`leaderboard.build` makes them from records.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from upcycle_bench.reporting.comparable import Table
from upcycle_bench.reporting.targets import Target

GUEST = "closed division"  # what marks its rows in a table of the open one


@dataclass(frozen=True)
class SeedMean:
    """A mean over `n` training seeds and the half width of its 95 % confidence interval (None for one seed)."""

    mean: float
    half_width: float | None
    n: int


@dataclass(frozen=True)
class RowHeadline:
    """A headline score of a row, and how it stands to the others' (`standings.Standing`).

    difference: to the baseline's, paired by both seeds; p: of it, by Holm over the table. standard_error: an upper
    bound of one run's, over evaluation samples. of_init, of_train: standard deviations over seeds of each kind.
    spread: that of paired differences over training seeds; samples: their standard error over evaluation samples.
    """

    mean: SeedMean
    difference: SeedMean | None
    standard_error: float | None
    p: float | None
    verdict: str
    ranks: tuple[int, int] | None
    letters: str
    of_init: float | None
    of_train: float | None
    spread: float | None
    samples: float | None


@dataclass(frozen=True)
class BoardHeadline:
    """A headline score of a board: the scores whose mean it is, its direction, and the value of guessing."""

    parts: tuple[str, ...]
    higher_is_better: bool
    chance: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One strategy label: means over the runs that count, which are the newest successes of each pair of seeds.

    Values are None where no run succeeded. FLOPs and seconds are means per run. rank: the place of the mean among the
    rows that are ranked by the first headline score, 1 the best; None for the others.
    """

    rank: int | None
    label: str
    strategy: str
    kind: str  # the row's mark: reconstructed, parts reconstructed, control, unpublished; "": published
    guest: bool  # of the closed division, in a table of the open one
    headlines: dict[str, RowHeadline]  # empty where no run succeeded
    scores: dict[str, float]  # suite/dataset/metric -> mean
    standard_errors: dict[str, float]  # over evaluation samples, of the scores where all runs have one
    parameters_total: int | None
    parameters_active: int | None
    train_seconds: float | None
    train_flops: float | None
    train_joules: float | None  # of its devices, where they report it
    charged_flops: float | None  # of every phase before evaluation, and of all that tuned the row
    tokens_dropped: float | None
    targets: dict[str, Target]  # reference -> the way to its final score
    peer: str | None  # the label that differences are to; None where there is nothing to compare with
    runs: int  # how many count
    records: tuple[str, ...]  # their run ids, which the names of their files end with
    certified: int  # how many of these have a certificate
    failed: int
    superseded: int
    mixed: bool  # the runs that count differ in configuration, plugin version or code
    dirty: int  # how many of them ran with changes that no commit has
    status: str  # "ok" where a run succeeded, else the status of the newest run
    reason: str | None

    @property
    def title(self) -> str:
        """The label with its mark."""
        return self._marked(self.kind)

    @property
    def short_title(self) -> str:
        """The same with the first part of the mark."""
        return self._marked(self.kind.partition(";")[0])

    def _marked(self, mark: str) -> str:
        marks = "; ".join(filter(None, [mark, GUEST if self.guest else ""]))
        return f"{self.label} ({marks})" if marks else self.label

    @property
    def seeds(self) -> int:
        """How many training seeds count."""
        return max((headline.mean.n for headline in self.headlines.values()), default=0)

    @property
    def outcome(self) -> str:
        """How the runs ended, in words."""
        failed = [f"{self.failed} failed"] if self.failed else []
        if not self.headlines:
            reason = textwrap.shorten(self.reason or "", 80, placeholder=" ...")
            return f"{self.status}: {reason}" + (f" ({failed[0]})" if self.failed > 1 else "")
        superseded = [f"{self.superseded} superseded"] if self.superseded else []
        mixed = ["mixes configurations, versions or code"] if self.mixed else []
        dirty = [f"{self.dirty} of a dirty tree"] if self.dirty else []
        return ", ".join(["ok", *failed, *superseded, *mixed, *dirty])


@dataclass(frozen=True, kw_only=True)
class Board:
    """Runs with equal protocol, division, fingerprints and dense model.

    view: "steps", differences are to one baseline; "compute", to runs of its kind with as much compute.
    """

    view: str
    protocol: str
    division: str
    overrides: tuple[str, ...]
    unequal: str | None
    training_fingerprint: str
    suite_fingerprints: dict[str, str]
    dense: str
    headlines: dict[str, BoardHeadline]
    over_samples: tuple[str, ...]  # headline scores whose intervals are over evaluation samples, too
    baseline: str | None
    rows: tuple[Row, ...]

    @property
    def table(self) -> Table:
        """`comparable.table_of` its records."""
        suites = tuple(self.suite_fingerprints.items())
        return self.protocol, self.division, self.training_fingerprint, suites, self.dense

    @property
    def flops_ratios(self) -> list[float | None]:
        """Each row's charged FLOPs by the baseline's; None where one of them is unknown or the baseline has none."""
        base = next((row.charged_flops for row in self.rows if row.label == self.baseline), None)
        return [None if row.charged_flops is None or not base else row.charged_flops / base for row in self.rows]
