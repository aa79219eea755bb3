import runpy
from pathlib import Path

from setuptools import find_packages, setup

build = runpy.run_path("llama/kernels/build.py")  # by path: the package needs torch to import
version = runpy.run_path("llama/version.py")["VERSION"]

setup(
    name="llama-native",
    version=version,
    description="A native-PyTorch engine for Llama models: any device, any checkpoint, any number of ranks",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["llama", "llama.*"]),
    package_data={
        "llama.kernels": ["csrc/*"],
        "llama.bench": ["children/*.py"],
        "llama.server": ["page/*", "page/vendor/*", "page/vendor/*/*"],
    },
    ext_modules=build["extensions"](),
    cmdclass={"build_ext": build["ParallelBuild"]},
    install_requires=[
        "torch>=2.11",
        "sentencepiece>=0.2",
        "fairscale>=0.4.13",
        "fire>=0.7",
        "tokenizers>=0.21",
        "tiktoken>=0.9",
        "gguf>=0.17",
        "safetensors>=0.5",
        "jinja2>=3.1.6",
        "numpy>=2.0",
        "filelock>=3.20",
        "pydantic>=2.10",
        "typer>=0.15",
        "rich>=13",
        "psutil>=6; sys_platform != 'linux'",  # free memory; Linux tells it in a file
        "prompt_toolkit>=3.0.36",
        "llguidance>=1.9",
    ],
    extras_require={
        "hub": ["huggingface-hub>=1.0"],
        "bench": ["matplotlib>=3.9"],
        "server": ["fastapi>=0.115", "uvicorn>=0.34", "httptools>=0.6.3", "prometheus-client>=0.21"],
        "ray": ["ray[serve,data]>=2.60"],  # replicas; where they serve, with [server]
        "examples": ["openai>=1.92", "langchain-openai>=0.3"],
    },
    entry_points={"console_scripts": ["llama=llama.__main__:main"]},
)
