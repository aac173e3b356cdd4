"""`minireflect sample` from the checkout: `python sample.py "a tall red candle in still air"`, `--help`."""

import sys

from minireflect.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
