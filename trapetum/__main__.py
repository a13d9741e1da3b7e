"""`python -m trapetum` is the `trapetum` command."""

from trapetum.cli import main

main()
