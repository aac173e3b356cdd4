"""`minireflect train` from the checkout: `python train.py`, `python train.py srrl --rounds 0`, `--help`."""

import sys

from minireflect.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
