"""python -m benchmarks: this machine's roofline, then every op beside it and beside torch. See docs/benchmarks.md."""
