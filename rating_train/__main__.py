"""``python -m rating_train`` is the same program as ``rating-train``."""

from rating_train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
