"""`python -m service` is the program `darkroom`."""

from service.cli import main

main()
