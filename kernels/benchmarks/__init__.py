"""Benchmarks of msa_kernels: see README.md, run by run.py."""
