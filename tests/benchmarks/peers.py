"""gpuml beside PyTorch, JAX and scikit-learn, in one run: what `gpuml bench --peers` prints.

python tests/benchmarks/peers.py                      digits, mnist, wide; digits on a CPU
python tests/benchmarks/peers.py --workload digits
python tests/benchmarks/peers.py --sizes 100,512,20 --batch 256 --precision tf32
"""

import sys

from gpuml.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--peers", *sys.argv[1:]]))
