"""Commands of the command line, a file each where they are more than a call."""
