"""The page to try models in a browser: `pixelclip app`."""
