"""Experts: which of a mixture are needed, and which can be one."""
