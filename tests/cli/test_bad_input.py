"""Bad input and misuse: one line, status 2, and nothing written."""

import re
from pathlib import Path

import pytest

from tests.cli.test_main import call, command

BAD_INPUT = [
    (["run", "-s", "cluster-awre"], "unknown strategy 'cluster-awre': did you mean 'cluster-aware'"),
    (["run", "-s", "dense", "-p", "smok"], "unknown protocol 'smok': did you mean 'smoke' or 'smoke-dev'?"),
    (["run", "-s", "dense", "-p", "smoke", "--set", "moe.expert=4"], "unknown protocol key 'moe.expert'"),
    (["run", "-s", "cluster-aware", "-p", "smoke", "-o", "tau=2"], "cluster-aware: tau: Input should be less than"),
    (["run", "-s", "cluster-aware", "-p", "smoke", "-o", "tau"], "write it as KEY=VALUE"),
    (["run", "-s", "dense", "-p", "clip-b32"], "protocol clip-b32 needs --data"),
    (["run", "-s", "sparse-upcycling", "-p", "smoke", "--set", "moe.ep_size=2"], "torchrun --nproc_per_node 2"),
    (["run", "-s", "dense,cluster-awre"], "unknown strategy 'cluster-awre': did you mean 'cluster-aware'"),
    (["run", "-s", "dense,all"], "'all' stands alone"),
    (["run", "-s", "dense,dense"], "--strategy names dense twice"),
    (["run", "-s", "all", "-o", "tau=0.8"], "--option belongs to one strategy"),
    (["run", "-s", "dense", "--seeds", "2", "--init-seed", "0", "--train-seed", "0"], "leaves nothing to vary"),
    (["run", "-s", "all", "-p", "clip-b32"], "protocol clip-b32 needs --data"),
    (["run", "-s", "dense", "-p", "smoke", "--suite", ""], "--suite '': a name is empty; write --suite NAME or"),
    (["run", "-s", "dense", "-p", "smoke", "--suite", ","], "--suite ',': a name is empty"),
    (["evaluate", "x.safetensors", "--suite", ""], "--suite '': a name is empty"),
    (["evaluate", "x.safetensors", "--suite", "few-shot,"], "--suite 'few-shot,': a name is empty"),
    (["leaderboard", "nowhere"], "nowhere"),
    (["leaderboard", "."], "no records below .; make one with: upcycle-bench run --strategy cluster-aware"),
    (["data", "build", "digit"], "unknown world 'digit': did you mean 'digits'?"),
    (["pretrain", "-p", "clip-b32"], "protocol clip-b32 has no data of its own; give --data"),
    (["pretrain", "-p", "smoke", "--data", "x"], "protocol smoke brings its own data"),
    (["pretrain", "-p", "smoke", "--output", "model.pt"], "give a file name that ends in .safetensors"),
    (["pretrain", "-p", "smoke", "--output", "no/m.safetensors"], "no is not a folder; make it"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status = call(monkeypatch, *arguments)
    check_one_line(message, status, *capfd.readouterr(), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [next(case for case in BAD_INPUT if case[0][0] == name) for name in ("evaluate", "leaderboard", "data", "pretrain")]
    + [case for case in BAD_INPUT if "moe.ep_size=2" in case[0]],  # known last, after all that `run` imports for a plan
)
def test_what_a_process_imports_says_nothing_beside_that_line(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = command(*arguments, cwd=tmp_path)
    check_one_line(message, done.returncode, done.stdout, done.stderr, tmp_path)


def check_one_line(message: str, status: int, out: str, err: str, folder: Path) -> None:
    """Of bad input: `message` is in the only line on stderr, stdout and the working folder stay empty."""
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["experts"], "upcycle-bench experts: Missing argument 'RUN'. See: upcycle-bench experts --help"),
        (["leaderboard", "--format", "xml"], "upcycle-bench leaderboard: Invalid value for .*: 'xml' is not one of .*"),
        (["list", "nope"], "upcycle-bench list: Invalid value for 'kind': 'nope' is not one of 'strategies', .*"),
        (["run", "--seed", "x"], "upcycle-bench run: Invalid value for '--seed': .*"),
        (["run", "--bogus"], "upcycle-bench run: No such option: --bogus.*"),
        (["plot", "nowhere"], "upcycle-bench plot: Missing option '--figure'.*"),
        (["runn"], "upcycle-bench: No such command 'runn'. Did you mean 'run'[?] See: upcycle-bench --help"),
    ],
)
def test_misuse_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    """Errors of typer look like our own."""
    assert call(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(f"error: {says}\n", captured.err) and not captured.out
