"""Where runs go: this machine, or SLURM through submitit. Plan, submit, status, retry, cancel, collect. No torch in here."""
