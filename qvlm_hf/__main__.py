"""`python -m qvlm_hf` is `qvlm`."""

import sys

from qvlm_hf.cli import main

if __name__ == "__main__":
    sys.exit(main())
