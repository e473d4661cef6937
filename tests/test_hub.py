"""packaging/hub.py: the layout for the Hugging Face Hub, and what `kernels` loads of it."""

import ast
import base64
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NEEDS_KERNELS = "kernels is not installed: pip install '.[hub]'"


def hub(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "packaging" / "hub.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def lay_out(folder: Path, *arguments) -> Path:
    done = hub("--out", folder, *arguments)
    assert done.returncode == 0, done.stderr
    return folder


def names_below(folder: Path, *suffixes: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in suffixes}


# ---- the source layout ----


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return lay_out(tmp_path_factory.mktemp("hub") / "source", "--repo-id", "someone/cce-ext")


def build_toml(folder: Path) -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    return tomllib.loads((folder / "build.toml").read_text())


def test_build_toml_holds_every_source(source):
    build = build_toml(source)
    assert build["general"]["backends"] == ["cpu", "cuda"]
    assert build["general"]["hub"] == {"repo-id": "someone/cce-ext"}
    assert build["torch"]["stable-abi"] == {"cpu": "2.10", "cuda": "2.10"}
    listed = {backend: list(build["torch"]["src"]) for backend in build["general"]["backends"]}
    for kernel in build["kernel"].values():
        listed[kernel["backend"]] += kernel["src"]
    there = {f"csrc/{name}" for name in names_below(ROOT / "csrc", ".cpp", ".cu", ".h", ".cuh")}
    binding = {"torch-ext/torch_binding.cpp", "torch-ext/cce_build.h"}
    assert sorted(listed["cuda"]) == sorted(there | binding)
    # The same library as CCE_CUDA=OFF.
    compiled = {name for name in listed["cpu"] if name.endswith((".cpp", ".cu"))}
    assert compiled == {"csrc/ops/build_info.cpp", "csrc/ops/schema.cpp", "torch-ext/torch_binding.cpp"}
    assert not [name for name in listed["cuda"] if not (source / name).is_file()]


def test_build_toml_names_the_architectures(source):
    kernels = build_toml(source)["kernel"]
    of_hopper = {name for name, x in kernels.items() if any(file.endswith("_sm90.cu") for file in x["src"])}
    assert {name for name, x in kernels.items() if x.get("cuda-capabilities") == ["9.0a"]} == of_hopper != set()
    for name, kernel in kernels.items():
        if kernel["backend"] == "cuda" and name not in of_hopper:
            assert kernel["cuda-capabilities"][0] == "8.0+PTX" and kernel["cuda-capabilities"][-1].endswith("+PTX")
            assert {"9.0", "10.0"} < set(kernel["cuda-capabilities"])


def test_python_is_the_package_without_its_ops(source):
    package = source / "torch-ext" / "cce_ext"
    ours = names_below(ROOT / "cce_ext", ".py") - {"_ops.py"}
    assert names_below(package, ".py") == ours
    assert all((package / name).read_bytes() == (ROOT / "cce_ext" / name).read_bytes() for name in ours)


def test_card_takes_the_repository_from_kernel_builder(source):
    card = (source / "CARD.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    assert 'get_kernel("{{ repo_id }}", version={{ version }})' in card


def test_kernels_understands_build_toml(source):
    pytest.importorskip("kernels", reason=NEEDS_KERNELS)
    from kernels._rust import Build

    assert [str(x) for x in Build.open(source).general.backends] == ["cpu", "cuda"]
    text = (source / "build.toml").read_text()
    wrong = source.parent / "wrong"
    wrong.mkdir(exist_ok=True)
    (wrong / "build.toml").write_text(text.replace("cxx-flags", "cxxflags"))
    with pytest.raises(ValueError):
        Build.open(wrong)


def test_again_into_the_same_folder(tmp_path):
    folder = lay_out(tmp_path / "layout")
    (folder / "csrc" / "of_an_older_version.cu").touch()
    before = (folder / "build.toml").read_text()
    lay_out(folder)
    assert not (folder / "csrc" / "of_an_older_version.cu").exists()
    assert (folder / "build.toml").read_text() == before


def test_refuses(tmp_path):
    (tmp_path / "thesis.tex").touch()
    done = hub("--out", tmp_path)
    assert done.returncode == 1 and f"--out: {tmp_path} holds files that are not" in done.stderr
    assert (tmp_path / "thesis.tex").exists()
    done = hub("--out", tmp_path / "thesis.tex")
    assert done.returncode == 1 and "is no folder" in done.stderr
    done = hub("--out", tmp_path / "new", "--library", tmp_path / "none.so")
    assert done.returncode == 1 and "none.so is no file" in done.stderr
    done = hub("--out", tmp_path / "new", "--repo-id", "cce-ext")
    assert done.returncode == 2 and "--repo-id must be OWNER/NAME, but is 'cce-ext'" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_refuses_a_library(tmp_path):
    """Such as an install's: its operators are in torch.ops.cce, where those of another version may be already."""
    import cce_ext

    (tmp_path / "thesis.tex").touch()
    done = hub("--out", tmp_path / "new", "--library", tmp_path / "thesis.tex")
    assert done.returncode == 1 and "thesis.tex cannot be loaded" in done.stderr
    done = hub("--out", tmp_path / "new", "--library", Path(cce_ext.__file__).with_name("_C.abi3.so"))
    assert done.returncode == 1 and "build it with -DCCE_NAMESPACE=" in done.stderr


# ---- the namespace ----


def test_the_package_imports_itself_relatively():
    """kernels imports it under another name."""
    for path in (ROOT / "cce_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [x.name for x in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.append(node.module)
            assert not [x for x in modules if x.split(".")[0] == "cce_ext"], f"{path.name}:{node.lineno}"


def test_only_one_module_knows_the_namespace():
    for path in (ROOT / "cce_ext").rglob("*.py"):
        if path.name != "_ops.py":
            found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if knows_namespace(node)]
            assert not found, f"{path.name}:{found}: operators are reached through _ops.py"


def knows_namespace(node: ast.AST) -> bool:
    """torch.ops.cce, and the string "cce::..." as an argument."""
    if isinstance(node, ast.Attribute) and node.attr == "cce":
        return ast.unparse(node) == "torch.ops.cce"
    constants = [x.value for x in node.args if isinstance(x, ast.Constant)] if isinstance(node, ast.Call) else []
    registers = isinstance(node, ast.Call) and "library" in ast.unparse(node.func)
    return registers and any(str(x).startswith("cce") for x in constants)


def test_the_namespace_is_the_sources(tmp_path):
    """A build of another source has another one."""
    copy = tmp_path / "copy"
    for name in ("csrc", "cce_ext", "packaging"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)

    def namespace() -> str:
        script = str(copy / "packaging" / "hub.py")
        return subprocess.run([sys.executable, script, "--namespace-of", "cpu"], capture_output=True, text=True).stdout

    ours = hub("--namespace-of", "cpu").stdout
    assert ours.startswith("_cce_ext_cpu_") and ours.strip().isidentifier()
    assert namespace() == ours != hub("--namespace-of", "cuda").stdout
    for name in ("csrc/tile/sampling.h", "cce_ext/transformers/patch.py"):
        before = namespace()
        with (copy / name).open("a") as file:
            file.write("\n")
        assert namespace() not in (before, "")


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_bad_namespace(tmp_path):
    command = ["cmake", f"-S{ROOT}", f"-B{tmp_path}", "-DCCE_CUDA=OFF", "-DCCE_NAMESPACE=cce-ext"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "CCE_NAMESPACE must be an identifier, but is 'cce-ext'" in " ".join(done.stderr.split())


# ---- the built layout ----


def test_the_variant_of_a_cuda_build(tmp_path):
    """Its name and its architectures, in the words of kernels."""
    spec = importlib.util.spec_from_file_location("cce_hub", ROOT / "packaging" / "hub.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"a library")
    info = {"cuda_version": "13.0", "cuda_archs": ["80", "90a", "120"], "torch_target": "2.10"}
    built = script.Library(library, "cuda", "_cce_ext_cuda_0", info)
    folder = script.write_variant(tmp_path, script.read_project(), built)
    assert folder.name.startswith("torch-stable-abi210-cu130-")
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["backend"] == {"type": "cuda", "archs": ["8.0", "9.0a", "12.0"]}
    assert (folder / "_ops.py").read_text().count('NAMESPACE = "_cce_ext_cuda_0"\n') == 1
    variants = pytest.importorskip("kernels.variants", reason=NEEDS_KERNELS)
    variant = variants.parse_variant(folder.name)
    assert variant.variant_str == folder.name
    assert (str(variant.framework.version), str(variant.arch.backend.version)) == ("2.10", "13.0")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A layout with a CPU build of this source."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("hub")
    configure = [
        "cmake",
        f"-S{ROOT}",
        f"-B{folder / 'cmake'}",
        "-DCCE_CUDA=OFF",
        f"-DCCE_TORCH_DIR={Path(torch.__file__).parent}",
        f"-DCCE_NAMESPACE={hub('--namespace-of', 'cpu').stdout.strip()}",
        f"-DCCE_OUTPUT_DIR={folder / 'library'}",
    ]
    for command in (configure, ["cmake", "--build", str(folder / "cmake")]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}"
    return lay_out(folder / "layout", "--library", folder / "library" / "_C.abi3.so")


def run(code: str, built: Path, **environment: str) -> str:
    """What code prints in a process without a network, whose Python finds this clone's cce_ext as well."""
    code = f"import json, sys; from pathlib import Path; LAYOUT = Path({str(built)!r})\n" + code
    kept = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(built.parent / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, cwd=built.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_metadata(built):
    (variant,) = (built / "build").iterdir()
    assert variant.name.startswith("torch-stable-abi210-cpu-")
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["id"] == hub("--namespace-of", "cpu").stdout.strip()
    assert (metadata["name"], metadata["version"]) == ("cce-ext", 0)
    assert metadata["backend"] == {"type": "cpu"}
    files = {path.relative_to(variant).as_posix(): path for path in variant.rglob("*") if path.is_file()}
    del files["metadata.json"]
    assert metadata["digest"]["files"] == {
        name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode() for name, path in files.items()
    }


BESIDE_OUR_OWN = """
import torch
import cce_ext
import kernels

hub = kernels.get_local_kernel(LAYOUT, backend="cpu")
assert hub.__name__ != cce_ext.__name__ and Path(hub.__file__).is_relative_to(LAYOUT), hub
assert hub.linear_cross_entropy is not cce_ext.linear_cross_entropy

def step(module, impl, call=lambda f: f):
    torch.manual_seed(0)
    e, c = torch.randn(48, 32, requires_grad=True), torch.randn(2000, 32, requires_grad=True)
    bias, targets = torch.randn(2000, requires_grad=True), torch.randint(2000, (48,))
    loss = call(lambda *x: module.linear_cross_entropy(*x, impl=impl, softcap=5.0))(e, c, targets, bias)
    return loss, *torch.autograd.grad(loss, (e, c, bias))

def graph_of(module):
    graphs = []
    def backend(graph, inputs):
        graphs.append({str(x.target) for x in graph.graph.nodes})
        return graph
    return step(module, "cce", lambda f: torch.compile(f, backend=backend, fullgraph=True)), graphs

used = {}
for module in (hub, cce_ext, hub):  # neither is in the other's way, whichever comes first
    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            used.setdefault(module.__name__, set()).add(op.namespace)
            return op(*args, **(kwargs or {}))
    with Seen():
        step(module, "cce")
equal = {}
for impl in cce_ext.IMPLS:
    if impl != "torch_compile":
        equal[impl] = all(torch.equal(x, y) for x, y in zip(step(hub, impl), step(cce_ext, impl), strict=True))
compiled, graphs = graph_of(hub)
ours, our_graphs = graph_of(cce_ext)
equal["compiled"] = all(torch.equal(x, y) for x, y in zip(compiled, ours, strict=True))
print(json.dumps({
    "name": hub.__name__,
    "used": {name: sorted(x - {"aten", "prim"}) for name, x in used.items()},
    "equal": equal,
    "graphs": [sorted(x for g in y for x in g if "lce_forward" in x) for y in (graphs, our_graphs)],
    "info": json.loads(getattr(torch.ops, hub.__name__).build_info())["cuda"],
}))
"""


@pytest.mark.slow
def test_loaded_beside_our_own(built):
    """Both in one process: the same loss and gradients, each by its own operators, eager and compiled."""
    pytest.importorskip("kernels", reason=NEEDS_KERNELS)
    found = json.loads(run(BESIDE_OUR_OWN, built))
    name = hub("--namespace-of", "cpu").stdout.strip()
    assert found["name"] == name
    assert found["used"] == {name: [name], "cce_ext": ["cce"]}
    assert found["equal"] and all(found["equal"].values()), found["equal"]
    assert found["graphs"] == [[f"{name}.lce_forward"], ["cce.lce_forward"]]


@pytest.mark.slow
def test_get_kernel_takes_it_for_a_repository(built):
    """LOCAL_KERNELS puts a layout in the place of the repository that a program asks for. No cce_ext is there."""
    pytest.importorskip("kernels", reason=NEEDS_KERNELS)
    code = """
import kernels, torch
cce = kernels.get_kernel("someone/cce-ext", version=0, backend="cpu")
e = torch.randn(8, 4, requires_grad=True)
loss = cce.LinearCrossEntropy(impl="cce_exact")(e, torch.zeros(7, 4), torch.arange(8) % 7)
loss.backward()
assert e.grad.shape == e.shape
print(json.dumps([round(loss.item(), 4), "cce_ext" in sys.modules, hasattr(torch.ops.cce, "build_info")]))
"""
    assert json.loads(run(code, built, LOCAL_KERNELS=f"someone/cce-ext={built}")) == [1.9459, False, False]  # log 7


@pytest.mark.slow
def test_transformers_is_patched_from_there(built):
    for name, reason in (("kernels", NEEDS_KERNELS), ("transformers", "transformers is not installed")):
        pytest.importorskip(name, reason=reason)
    code = """
import importlib, kernels, torch, transformers
cce = kernels.get_local_kernel(LAYOUT, backend="cpu")
cce_patch = importlib.import_module(".transformers", cce.__name__).cce_patch
config = transformers.LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)
model = transformers.LlamaForCausalLM(config)
ids = torch.randint(300, (2, 9))
dense = model(input_ids=ids, labels=ids).loss
patched = cce_patch(model, impl="cce_exact")(input_ids=ids, labels=ids)
print(json.dumps([abs(float(dense - patched.loss)) < 1e-5, patched.logits is None, "cce_ext" in sys.modules]))
"""
    assert json.loads(run(code, built)) == [True, True, False]


@pytest.mark.slow
def test_the_layer_of_the_docs(built, tmp_path):
    """docs/integrations.md: kernelize puts the folder's CCEForCausalLMLoss in the place of a model's loss."""
    pytest.importorskip("kernels", reason=NEEDS_KERNELS)
    recipe = python_block("As a layer of a model").replace('Path("build/hub")', "LAYOUT")
    code = f"""{recipe}
dense = torch.nn.functional.linear(model.embed(ids), model.lm_head.weight)[:, :-1].flatten(0, 1)
same = abs(float(loss - torch.nn.functional.cross_entropy(dense, ids[:, 1:].flatten()))) < 1e-4
module = sys.modules[model.loss.forward.__module__]
print(json.dumps([same, model.lm_head.weight.grad is not None, Path(module.__file__).is_relative_to(LAYOUT)]))
"""
    assert json.loads(run(code, built)) == [True, True, True]


def python_block(section: str) -> str:
    """The first Python of a section of docs/integrations.md."""
    text = (ROOT / "docs" / "integrations.md").read_text()
    return text.split(f" {section}\n", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
