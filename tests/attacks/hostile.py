"""Files as somebody who means harm would make them."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from gpuml import MLP
from gpuml.datasets import Preprocessing
from gpuml.model_files import checksum

FEATURES = np.arange(12.0).reshape(4, 3) ** 2
CLASSES = np.array(["b", "a", "c", "a"])


def a_model(y: np.ndarray = CLASSES, dtype: Any = np.float32) -> MLP:
    """A model of three features, with preprocessing."""
    task = "classification" if y.ndim == 1 else "regression"
    prepare = Preprocessing.fit(FEATURES, y, task, feature_names=("u", "v", "w"), target_name="t")
    model = MLP([3, 4, prepare.n_outputs], dtype=dtype, device="cpu")
    model.preprocessing = prepare
    return model


def parts(raw: bytes, key: str = "gpuml") -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The header of a safetensors file, the description in it without its checksum, the data."""
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    description = json.loads(header.pop("__metadata__")[key])
    del description["sha256"]
    return header, description, raw[8 + n :]


def joined(header: Any, data: bytes) -> bytes:
    """A safetensors file of a header, as it is or to be made JSON, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def signed(arrays: dict[str, np.ndarray], description: Any, key: str = "gpuml") -> bytes:
    """A file whose checksum fits, whatever is in it: a checksum is no signature."""
    text = description
    if isinstance(description, dict):
        plain = json.dumps(description, sort_keys=True)
        text = json.dumps(description | {"sha256": checksum(arrays, plain)})
    elif not isinstance(description, str):
        text = json.dumps(description)
    return save(arrays, {key: text})


def npy(header: str | bytes, data: bytes = b"", version: bytes = b"\1\0", length=None) -> bytes:
    """An .npy file of any header."""
    text = header if isinstance(header, bytes) else header.encode()
    n = len(text) if length is None else length
    digits = 2 if version == b"\1\0" else 4
    return b"\x93NUMPY" + version + n.to_bytes(digits, "little") + text + data


def header(descr: str, shape: Any, order: bool = False) -> str:
    return f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def archive(
    members: dict[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED
) -> bytes:
    """An archive of members as they are given, also twice the same name."""
    buffer = io.BytesIO()
    pairs = members.items() if isinstance(members, dict) else members
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in pairs:
            file.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


class Bomb:
    """Makes a file as soon as a pickle of it is read; harmless, and seen."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)
