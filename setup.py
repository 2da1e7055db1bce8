"""Installs Pilesmith: `pip install -e .`, or `pip install -e '.[test]'` with what the tests need."""

from setuptools import setup

setup(
    name="pilesmith",
    version="0.1.0",
    description="Train GPTs from scratch on the Pile, on the card you have.",
    license="MIT",
    python_requires=">=3.11",
    packages=[
        "engine",
        "engine.strategy",
        "kernels",
        "tools",
        "tools.bpe",
        "tools.fetching",
        "tools.preparing",
        "tools.profiling",
        "tools.tuning",
        "benchmarks",
    ],  # fmt: skip
    package_data={
        "engine": ["vocabulary/*.tiktoken"],
        "kernels": ["configs/*.json"],
        "tools.bpe": ["code_point_classes.txt"],
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.9; platform_system == 'Linux'",
        "deepspeed>=0.19; platform_system == 'Linux'",
        "filelock",
        "huggingface_hub>=1.0",
        "matplotlib",
        "msgspec",
        "numba>=0.61",
        "numpy",
        "psutil",
        "safetensors",
        "tensorboard",
        "tiktoken>=0.9",
        "tqdm",
        "zstandard",
    ],
    extras_require={
        "hdf5": ["h5py"],
        "test": ["h5py", "hypothesis", "jsonschema", "pytest", "pytest-benchmark", "pytest-xdist", "transformers"],
    },
)
