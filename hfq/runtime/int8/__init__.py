"""Modules with int8 weights, which stand where float ones stood."""
