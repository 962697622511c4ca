"""`frozenprefix train` as a script: `accelerate launch recipes/train.py RECIPE.yaml [key=value ...]`."""

from __future__ import annotations

import sys

from frozenprefix.cli.main import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]])
