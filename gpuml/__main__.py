"""`python -m gpuml` is the same as `gpuml`."""

import sys

from gpuml.cli import main

sys.exit(main())
