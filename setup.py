"""Build: maps kernels/ops to genarm_fast.kernels. Never imports torch, so that isolated builds stay small."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["genarm_fast", "genarm_fast.*"]), "genarm_fast.kernels"],
    package_dir={"genarm_fast": "genarm_fast", "genarm_fast.kernels": "kernels/ops"},
    package_data={"genarm_fast": ["py.typed", "demo/arms/*/*"]},
)
