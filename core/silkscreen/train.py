"""`accelerate launch [its options] -m silkscreen.train FLAGS`: the same program as `silkscreen train FLAGS`."""

import sys

from silkscreen.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
