"""Tests of the room `util`."""
