"""`python -m alexnet_flax VERB ...`, the same as `alexnet-flax VERB ...`."""

import sys

from alexnet_flax.cli.main import main

if __name__ == '__main__':
  sys.exit(main())
