"""`python -m longfit.bench RECIPE [--output FOLDER] [--data FOLDER] [--json]`."""

import argparse
import json
import sys

from longfit.bench import render, run
from longfit.errors import LongfitError


def main() -> int:
    """Run one recipe; the table (or one JSON object) goes to stdout. 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m longfit.bench", description=run.__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--output")
    parser.add_argument("--data", help="folder of .txt books for the prompt")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        result = run(arguments.recipe, arguments.output, arguments.data)
    except LongfitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result) if arguments.json else render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
