"""Authored pairs that ship, and `python -m grpo_routing.pairs check`: does a reading of a pair file tell its two sides apart?"""
