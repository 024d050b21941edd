"""Tests of the room `upcycling`."""
