"""``rating-train preflight`` at its former path."""

import sys

from rating_train.cli import main

raise SystemExit(main(["preflight", *sys.argv[1:]]))
