"""`python -m pixelclip`."""

from pixelclip.cli import main

main()
