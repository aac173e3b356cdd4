"""`python -m minireflect` is the console command `minireflect`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
