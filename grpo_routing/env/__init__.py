"""The world that the policy acts in: problems, loopholes, the sandbox and the flawed grader. Standard library only."""
