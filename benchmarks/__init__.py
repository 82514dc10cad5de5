"Speed and memory of selfclass beside its peers, measured in one run: `python -m benchmarks --help`."
