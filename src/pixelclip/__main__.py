"""`python -m pixelclip`."""

from pixelclip.cli.app import main

main()
