"""`python -m serval.cli`."""

from serval.cli import main

main()
