#!/bin/sh
# The rows of `make bench` on a CUDA device, timed with events; its own JSON, so that the CPU's stays what it is.
cd "$(dirname "$0")/../.." && exec "${PYTHON:-.venv/bin/python}" -m tests.bench --device cuda --json tests/bench/latest-gpu.json "$@"
