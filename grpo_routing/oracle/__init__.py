"""The truth: hidden tests and verdicts. Measurement only; delete this folder and training still runs."""
