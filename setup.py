"""Lists the packages: everything under kalmanguard/, and models/ under the name kalmanguard.models.

setuptools can find packages by itself or map a folder to a name, but in pyproject.toml not both at once.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["kalmanguard", "kalmanguard.*"]),
        "kalmanguard.models",
        "kalmanguard.models.calibration",
        "kalmanguard.models.predictor",  # data only
    ],
    package_dir={"kalmanguard.models": "models"},
)
