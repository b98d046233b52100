"""docs/concepts.md: nothing in it was measured."""
