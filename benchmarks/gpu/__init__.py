"""The benchmarks on an NVIDIA GPU: see __main__.py."""
