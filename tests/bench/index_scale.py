"""How large an index may be: opened at 400 million pairs, built for a million real ones.

python -m tests.bench.index_scale open --pairs 400_000_000 --shards 40_000 --folder /tmp/scale
python -m tests.bench.index_scale build --pairs 1_000_000 --shards 100 --folder /tmp/scale

`open` writes a packed index of generated rows and empty files as shards (16 bytes a pair), and opens it in a fresh
process as a start does: every shard is asked for its size and time, and a window of rows is read. `build` writes shards
of tiny JPEGs (3 kB a pair) and indexes them by 1, 2, ... processes. Each prints its figures as JSON. With
`--processes 8`, `open` ends with what a node of eight ranks takes that start at once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from upcycle_bench.data import open_index as opening
from upcycle_bench.data import packed_index, places
from upcycle_bench.data.index import ROW
from upcycle_bench.data.sources import Sources
from upcycle_bench.util import strict_json
from upcycle_bench.util.environment import cores
from upcycle_bench.util.files import write_atomically

WINDOW = 1 << 20  # pairs that a training shuffles among each other


def generate(folder: Path, pairs: int, shards: int) -> Sources:
    """A packed index of `pairs` pairs in the cache of `folder`, and an empty file for each shard."""
    (train := folder / "train").mkdir(parents=True)
    counts = np.full(shards, pairs // shards)
    counts[: pairs % shards] += 1
    sources = Sources.of([train / f"{number:05d}.tar" for number in range(shards)])
    for place in sources.shards:
        Path(place).touch()
    stamps = places.stamps(sources.shards)

    def parts() -> Iterator[np.ndarray]:
        for count in counts.tolist():
            rows = np.zeros(count, ROW)
            rows["image"] = 1 + 54 * np.arange(count)
            rows["image_bytes"], rows["text"], rows["text_bytes"] = 25_000, rows["image"] + 51, 60
            yield rows

    path = packed_index.path_of(sources)
    packed_index._write_rows(packed_index._rows_path(path, 0), parts())
    facts = {
        "digests": [f"{number:064x}" for number in range(shards)],
        "starts": [0, *np.cumsum(counts).tolist()],
        "left_out": {"no caption": 12},
        "suffixes": {"jpg": pairs, "txt": pairs},
        "faults": [],
        "sizes": [stamp.size for stamp in stamps],
        "times": [stamp.time for stamp in stamps],
        "version": 0,
    }
    write_atomically(path, strict_json.dumps(facts, separators=(",", ":")).encode())
    return sources


def open_here(folder: Path) -> dict[str, Any]:
    """What a start does, in this process: seconds, and memory of this process alone and at most, in bytes."""
    before = memory()
    start = time.perf_counter()
    sources = opening_sources(folder)
    expanded = time.perf_counter()
    index = opening.open_index(sources, "--data")
    opened = time.perf_counter()
    shards = np.random.default_rng(0).integers(0, len(index.shards), WINDOW // 10_000 + 1)
    rows = [index.rows[index.starts[shard] : index.starts[shard + 1]] for shard in shards]
    blocks = sum(int(part["image_bytes"].astype(np.int64).sum()) for part in rows)
    return {
        "pairs": len(index),
        "shards": len(index.shards),
        "seconds_to_name_shards": round(expanded - start, 3),
        "seconds_to_open": round(opened - expanded, 3),
        "seconds_to_read_a_window": round(time.perf_counter() - opened, 3),
        "bytes_in_window": blocks,
        "private_before": before["RssAnon"],
        "private": memory()["RssAnon"],
        "peak": memory()["VmHWM"],
    }


def open_together(command: list[str], processes: int) -> dict[str, Any]:
    """What so many processes that open the index at once take together; `private`: without what imports take."""
    began = time.perf_counter()
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    figures = [json.loads(process.communicate()[0]) for process in started]
    return {
        "processes": processes,
        "seconds_with_imports": round(time.perf_counter() - began, 3),
        "seconds_to_open": max(each["seconds_to_open"] for each in figures),
        "private": sum(each["private"] - each["private_before"] for each in figures),
    }


def opening_sources(folder: Path) -> Sources:
    """The shards of the folder, named as --data names them."""
    from upcycle_bench.data.sources import expand_sources

    return expand_sources(str(folder / "train"))


def memory() -> dict[str, int]:
    """Bytes of this process's memory, by the names of /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) << 10 for line in lines if line[-1] == "kB"}


def write_shards(folder: Path, pairs: int, shards: int) -> None:
    """Shards of tiny JPEGs with captions, as img2dataset writes them: a .jpg, a .json and a .txt for each sample."""
    (train := folder / "train").mkdir(parents=True)
    images = []
    for shade in range(16):
        Image.new("RGB", (16, 16), (shade * 16, 90, 200)).save(buffer := io.BytesIO(), "JPEG")
        images.append(buffer.getvalue())
    rng = random.Random(0)
    words = ["cat", "dog", "house", "a", "the", "on", "photo", "red", "small", "street"]
    for shard in range(shards):
        with tarfile.open(train / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in range(shard * pairs // shards, (shard + 1) * pairs // shards):
                caption = " ".join(rng.choices(words, k=9))
                files = {"jpg": rng.choice(images), "json": b"{}", "txt": caption.encode()}
                for suffix, content in files.items():
                    info = tarfile.TarInfo(f"{sample:09d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def build_here(folder: Path, processes: int) -> dict[str, Any]:
    """The figures of `data index` by that many processes, into an empty cache."""
    os.environ["UPCYCLE_BENCH_CACHE"] = str(cache := folder / f"cache-{processes}")
    opening.cores = lambda: processes
    before = cpu_seconds()
    facts = opening.index_facts(opening_sources(folder), "SHARDS", opening.Reporter())
    shutil.rmtree(cache)
    return {"processes": processes, **facts, "cpu_seconds": round(cpu_seconds() - before, 1)}


def cpu_seconds() -> float:
    """Of this process and those that it waited for: what a busy machine takes does not count."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main(arguments: list[str]) -> None:
    """Measure in fresh processes, and delete what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["open", "build", "open-here"])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1, help="of a node, for `open`")
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args(arguments)
    folder = given.folder.absolute()
    if given.what != "build":
        os.environ["UPCYCLE_BENCH_CACHE"] = str(folder / "cache")
    if given.what == "open-here":
        print(json.dumps(open_here(folder)))
        return
    try:
        if given.what == "build":
            write_shards(folder, given.pairs, given.shards)
            for processes in range(1, cores() + 1):
                print(json.dumps(build_here(folder, processes)), flush=True)
            return
        generate(folder, given.pairs, given.shards)
        command = [sys.executable, "-m", "tests.bench.index_scale", "open-here", "--folder", str(folder)]
        for _ in range(2):  # the second time, the kernel has the files in memory
            subprocess.run(command, check=True)
        if given.processes > 1:
            print(json.dumps(open_together(command, given.processes)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
