"""Tests of the room `suites`."""
