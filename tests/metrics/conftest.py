"""What the reference tools say of a few pairs of masks."""

import base64
import json
import zlib
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def golden():
    """golden_surface.json, made by golden_surface.py beside it, its masks unpacked."""
    found = json.loads(Path(__file__).with_name("golden_surface.json").read_text(encoding="utf-8"))
    for case in found["surfaces"] + found["lesions"]:
        size = int(np.prod(case["shape"]))
        for key in ("prediction", "truth"):
            bits = np.frombuffer(zlib.decompress(base64.b85decode(case[key])), np.uint8)
            case[key] = np.unpackbits(bits, count=size).reshape(case["shape"]).astype(bool)
    return found
