"""Run the command line: `python -m silkscreen`."""

from silkscreen.cli import main

main()
