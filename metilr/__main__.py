"""``python -m metilr``: what ``metilr`` is."""

import sys

from metilr.cli import main

if __name__ == "__main__":
    sys.argv[0] = "metilr"  # what messages and results say
    main()
