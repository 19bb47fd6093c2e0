"""A model's files: which of a hub's are not wanted, and whether all that are wanted are here.

It imports nothing of this project: an image's layer with a model stands on this file alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from common.files import read_file

NOT_WEIGHTS = ["original/*", "*.pth", "*.gguf", "onnx/*", "*.onnx", "*.h5", "*.msgpack"]


def is_complete(folder: Path) -> bool:
    """A download that was cut off leaves a folder that looks whole from outside."""
    if not is_described(folder):
        return False
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(read_file(index))["weight_map"].values())
        return all((folder / name).is_file() for name in names)
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def is_described(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def find_lack(folder: Path) -> str:
    """Why a folder is not complete, for its owner."""
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter alone; merge it into its base model (`merge_and_unload`)"
    if any(path.is_symlink() and not path.exists() for path in folder.iterdir()):
        return "its files are links to elsewhere; copy them with `cp -rL`"
    if not is_described(folder):
        return "it has no config.json"
    return "it has no weights (*.safetensors, *.bin), or not all that its index names"
