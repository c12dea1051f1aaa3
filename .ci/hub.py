"""`make hub`: the kernels alone, as Hugging Face's kernel-builder takes them and as its `kernels` loads them.

The builder takes `build.toml`, `flake.nix` and `torch-ext`. It needs Nix and the network. What the loader takes is made here:
`build` has a folder for each backend, with the same sources, metadata, and a module `_ops` that names the namespace of the ops.

python .ci/hub.py build/hub
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parents[1] / "entra_kernels"
ABOUT: dict[str, Any] = {"name": "entra-kernels", "license": "Apache-2.0"}
BACKENDS = ["cpu", "cuda", "rocm"]
BUILD = """[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = {backends}

[torch-noarch]
pyext = ["py", "json"]
"""
# The builder of this commit reads edition 5. What is newer may not.
FLAKE = """{
  inputs.kernel-builder.url = "github:huggingface/kernels/8ac69fc542a4306eade0759ef7c45b4f2ae57df0";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
OPS = """def add_op_namespace_prefix(op_name: str) -> str:
    return f"{namespace}::{{op_name}}"
"""


def make(folder: Path) -> None:
    """The project, in a folder that does not exist."""
    major = re.search(r'^__version__ = "(\d+)\.', (SOURCES / "__init__.py").read_text(), re.MULTILINE)
    assert major, "entra_kernels has no __version__"
    about = {**ABOUT, "version": int(major[1])}
    project = folder / "torch-ext" / "entra_kernels"
    shutil.copytree(SOURCES, project, ignore=shutil.ignore_patterns("_ops.py", "py.typed", "__pycache__"))
    (folder / "build.toml").write_text(BUILD.format(**about, backends=json.dumps(BACKENDS)))
    (folder / "flake.nix").write_text(FLAKE)

    digest = hashlib.sha256()
    for path in sorted(path for path in project.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(project)}\n".encode() + path.read_bytes())
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        namespace = f"_entra_kernels_{backend}_{digest.hexdigest()[:7]}"  # other sources, other ops
        shutil.copytree(project, variant)
        (variant / "_ops.py").write_text(OPS.format(namespace=namespace))
        metadata = {**about, "id": namespace, "python-depends": [], "backend": {"type": backend}}
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
