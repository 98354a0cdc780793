"""`python -m longfit`: the same as the command `longfit`."""

from longfit.cli import main

if __name__ == "__main__":
    main()
