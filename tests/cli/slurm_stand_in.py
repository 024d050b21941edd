"""Stand-ins for Slurm's programs: sbatch runs the whole array here, at once, as Slurm 22.05 would.

`install(folder)` writes sbatch, srun, scontrol, squeue, and an `upcycle-bench` that only notes that it was called.
"""

import sys
from pathlib import Path

SBATCH = """
import json, os, pathlib, re, shlex, subprocess, sys
here = pathlib.Path(__file__).parent
assert sys.argv[1] == "--parsable"
text = pathlib.Path(sys.argv[2]).read_text()
options = dict(shlex.split(line)[1][2:].partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH"))
print("41;cluster")
statuses = {}
for part in options["array"].partition("%")[0].split(","):
    low, _, high = part.partition("-")
    for index in range(int(low), int(high or low) + 1):
        restarts, requeued = 0, here / f"requeue-41_{index}"
        while True:
            env = {**os.environ, "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": str(index), "SLURM_NTASKS": "99"}
            env |= {"SLURM_JOB_ID": str(41 + index), "SLURM_JOB_NODELIST": "vm"}
            env |= {"SLURM_NTASKS_PER_NODE": options["ntasks-per-node"]}
            env |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
            with open(options["output"].replace("%a", str(index)), "ab") as log:
                done = subprocess.run(["bash", sys.argv[2]], env=env, cwd=options["chdir"], stdout=log, stderr=log)
            if not requeued.exists():
                break
            requeued.unlink()
            restarts += 1
        statuses[index] = done.returncode
(here / "statuses.json").write_text(json.dumps(statuses))
"""
SRUN = """
import os, subprocess, sys
command = [part for part in sys.argv[1:] if part not in ("--kill-on-bad-exit=0", "--wait=60")]
tasks = os.environ["SLURM_NTASKS_PER_NODE"]
step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "vm"}
step |= {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_TASKS_PER_NODE": tasks}
started = [
    subprocess.Popen(command, env={**os.environ, **step, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)})
    for n in range(int(tasks))
]
sys.exit(max(process.wait() for process in started))
"""
SCONTROL = """
import pathlib, sys
assert sys.argv[1] == "requeue"
(pathlib.Path(__file__).parent / f"requeue-{sys.argv[2]}").touch()
"""
SQUEUE = """
import pathlib, sys
waiting = pathlib.Path(__file__).parent / f"waiting-{sys.argv[-1]}"
print("41_1 PENDING") if waiting.exists() else sys.exit("slurm_load_jobs error: Invalid job id specified")
"""
# Each run of `sparse-upcycling` is unfinished at its first start; `dense-wide` fails.
UPCYCLE_BENCH = """
import os, pathlib, sys
sys.path[:] = [{source!r}, *sys.path]
from upcycle_bench.util.launchers import settle
arguments = settle(sys.argv[1:], os.environ)
here = pathlib.Path(__file__).parent
ranks = [os.environ.get(name, "-") for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")]
name = "-".join(arguments[part + 1] for part, text in enumerate(arguments) if text in ("--strategy", "--train-seed"))
trace = here / "trace" / f"{{name}}-rank{{ranks[0]}}"
starts = trace.read_text().count("start") if trace.exists() else 0
with trace.open("a") as file:
    print("start", *ranks, repr(arguments), file=file)
sys.exit(3 if "dense-wide" in arguments else 75 if "sparse-upcycling" in arguments and not starts else 0)
"""


def install(folder: Path) -> None:
    """Write the programs into `folder`."""
    (folder / "trace").mkdir(parents=True)
    source = str(Path(__file__).parents[2])
    programs = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}
    for name, text in {**programs, "upcycle-bench": UPCYCLE_BENCH.format(source=source)}.items():
        path = folder / name
        path.write_text(f"#!{sys.executable}{text}")
        path.chmod(0o755)
