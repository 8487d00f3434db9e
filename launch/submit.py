"""``rating-train submit`` at its former path."""

import sys

from rating_train.cli import main

raise SystemExit(main(["submit", *sys.argv[1:]]))
