"""Package discovery; everything else is in pyproject.toml.

`components/` and `pipelines/` install under longer names, which setuptools' own discovery cannot express.
"""

from setuptools import find_packages, setup

FOLDERS = {"pixelclip": "src/pixelclip", "pixelclip_components": "components", "pixelclip_pipelines": "pipelines"}

setup(
    package_dir=FOLDERS,
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{sub}" for sub in find_packages(folder)))
    ],
)
