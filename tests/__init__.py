"""Tests of upcycle-bench."""
