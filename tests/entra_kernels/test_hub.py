"""The kernels as `make hub` leaves them and Hugging Face's `kernels` loads them, beside the installed package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import entra_kernels

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # NaN in, NaN out


def make(repository: Path, folder: Path) -> Path:
    subprocess.run([sys.executable, repository / ".ci/hub.py", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    pytest.importorskip("kernels", reason="needs kernels: pip install 'entra-reward[hub]'")
    return make(ROOT, tmp_path_factory.mktemp("made") / "build/hub")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """The same of another version."""
    repository = tmp_path_factory.mktemp("earlier")
    for folder in (".ci", "entra_kernels"):
        shutil.copytree(ROOT / folder, repository / folder, ignore=shutil.ignore_patterns("__pycache__"))
    module = repository / "entra_kernels/__init__.py"
    module.write_text(module.read_text().replace(f'"{entra_kernels.__version__}"', '"0.0.1"'))
    return make(repository, repository / "hub")


@contextmanager
def nothing_installed() -> Iterator[None]:
    """No module called `entra_kernels` can be imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "entra_kernels"]:
            patch.setitem(sys.modules, name, None)
        yield


def load(project):
    """The kernel of the example in docs/kernels.md, as printed, run where `make hub` ran."""
    page = (ROOT / "docs/kernels.md").read_text().partition("## From Hugging Face's hub")[2]
    example, names = re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1], {}
    with chdir(project.parents[1]):
        exec(example, names)
    assert names["mu"].shape == (2, 512)
    return names["kernel"]


def results(package, backend):
    """What each operation gives."""
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 40, 16, generator=random), torch.randn(1, 2, 40, 16, generator=random)
    hidden, weight = torch.randn(40, 16, generator=random), torch.randn(30, 16, generator=random)
    ids, cu = torch.randint(0, 30, (40,), generator=random), torch.tensor([0, 25, 40])
    incoming = package.incoming_attention(q, k, backend=backend)
    logprobs = package.token_logprobs(hidden @ weight.T, ids, backend=backend)
    return [
        incoming,
        *package.incoming_attention(q, k, sample_rows=8, backend=backend),
        logprobs,
        *package.linear_token_logprobs(hidden, weight, ids, return_entropy=True, backend=backend),
        package.copies(ids, cu, ngram=1, backend=backend),
        package.first_places(ids, cu, ngram=1, backend=backend),
        *package.redundancy(logprobs, incoming[0], ids, cu, backend=backend),
    ]


def ops_called(package):
    """The custom ops of ours that are in the graph of one call."""

    def call(q, k):
        return package.incoming_attention(q, k)

    graph = make_fx(call, tracing_mode="fake")(torch.randn(1, 2, 6, 16), torch.randn(1, 1, 6, 16)).graph
    return {str(node.target) for node in graph.nodes if "entra_kernels" in str(node.target)}


def test_a_loaded_kernel_gives_what_the_installed_package_gives(project, backend):
    with nothing_installed():
        found = results(load(project), backend)
    expected = results(entra_kernels, backend)
    assert [torch.equal(one, other) for one, other in zip(found, expected, strict=True)] == [True] * 11


def test_two_versions_and_the_installed_package_call_ops_of_their_own(project, earlier):
    from kernels import get_local_kernel

    packages = [load(project), get_local_kernel(earlier), entra_kernels]
    assert [package.__version__ for package in packages] == [entra_kernels.__version__, "0.0.1", entra_kernels.__version__]
    assert len({package.__name__ for package in packages}) == 3
    registered = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    ops = [{op for namespace, op in registered if namespace == package.__name__} for package in packages]
    assert "incoming_attention" in ops[0]
    assert ops[0] == ops[1] == ops[2]
    for package in packages:
        assert ops_called(package) == {f"{package.__name__}.incoming_attention.default"}


def test_the_builder_reads_the_project_and_finds_no_name_that_is_its_own(project):
    from kernels._rust import Backend, Build, Metadata

    assert Build.open(project).general.backends == [Backend.CPU, Backend.CUDA, Backend.ROCm]
    sources = project / "torch-ext/entra_kernels"
    assert {path.name for path in project.iterdir()} == {"build.toml", "flake.nix", "torch-ext", "build"}
    assert not {"_ops.py", "entra_kernels", "metadata.json"} & {path.name for path in sources.iterdir()}
    for backend in ("cpu", "cuda", "rocm"):
        variant = project / "build" / f"torch-{backend}"
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert str(metadata.name) == "entra-kernels"
        assert metadata.id.startswith(f"_entra_kernels_{backend}_")
        assert str(metadata.version) == entra_kernels.__version__.partition(".")[0]
        made = {path.relative_to(variant).as_posix() for path in variant.rglob("*") if path.is_file()}
        taken = {path.relative_to(sources).as_posix() for path in sources.rglob("*") if path.is_file()}
        assert made - taken - {name for name in made if "__pycache__" in name} == {"_ops.py", "metadata.json"}
        assert {"__init__.py", "_triton/launch.json"} <= taken <= made


def test_make_hub_makes_it_anew(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for name in (".ci", "entra_kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for _ in range(2):
        subprocess.run(["make", "-f", ROOT / "Makefile", "hub"], cwd=tmp_path, env=environment, check=True)
        assert (tmp_path / "build/hub/build/torch-cpu/metadata.json").is_file()
        assert not (tmp_path / "build/hub/left").exists()
        (tmp_path / "build/hub/left").touch()
