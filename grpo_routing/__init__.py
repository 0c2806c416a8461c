"""Gradient routing against reward hacking in GRPO: measure, erase or route the hack-ward part of the gradient."""

__version__ = "0.1.0"
