"""open_clip model configurations of ours, one JSON file each; `upcycle_bench.dense` adds them to open_clip's."""
