"""Recipes unattended, or on many machines."""
