"""`python -m mcsd`."""

from .cli import main

main()
