"""Versions, hardware and settings that results can depend on, of this process."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

# What computes, what reads and writes weights and text, and what decides which stage runs on what.
PACKAGES = (
    "numprune",
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "numpy",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "dvc",
    "mlflow",
    "prefect",
    "model-signing",
)
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "PYTHONHASHSEED")


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that matter."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # A part of the pipeline that this machine does without.
    return versions


def read_environment() -> dict[str, Any]:
    """Interpreter, machine and torch's settings. The stages ran in such an environment if they ran on this machine."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
