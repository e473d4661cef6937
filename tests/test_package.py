"""The build: what it says when it cannot be done, and what the library it makes holds."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


# ---- the build's errors ----


def configure(tmp_path, *options, **environment) -> tuple[int, str]:
    """Exit code and output, its line breaks flattened, of a CMake configuration with these variables only."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_HOME", "CUDA_PATH")}
    done = subprocess.run(
        ["cmake", f"-S{ROOT}", f"-B{tmp_path}", *options],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@needs_cmake
@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH"])
def test_cuda_on_without_nvcc(tmp_path, variable):
    code, output = configure(tmp_path, "-DCCE_CUDA=ON", **{variable: "/nonexistent/cuda"})
    assert code != 0
    assert "CCE_CUDA=ON, but no CUDA compiler was found" in output
    assert f"{variable} is '/nonexistent/cuda'" in output
    assert "set CCE_CUDA=OFF" in output


@needs_cmake
@pytest.mark.parametrize("value", ["maybe", "on", "1", "ONN"])
def test_bad_cce_cuda(tmp_path, value):
    code, output = configure(tmp_path, f"-DCCE_CUDA={value}")
    assert code != 0
    assert f"CCE_CUDA must be AUTO, ON or OFF, but is '{value}'" in output


@needs_cmake
@pytest.mark.parametrize("value", ["80;sm_90", "80,,x", "80;-1"])
def test_bad_cce_cuda_archs(tmp_path, value):
    code, output = configure(tmp_path, f"-DCCE_CUDA_ARCHS={value}")
    assert code != 0
    assert "CCE_CUDA_ARCHS must be a list" in output


def program(folder: Path, name: str, script: str) -> Path:
    """A shell script in the place of a program."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@needs_cmake
def test_a_host_compiler_that_nvcc_refuses(tmp_path):
    """nvcc's own word comes with what helps; the compiler that CUDAHOSTCXX names is the one that is tried."""
    refusal = "echo '#error -- unsupported GNU version! gcc versions later than 15 are not supported!' >&2; exit 1"
    nvcc = program(tmp_path, "nvcc", f'case "$*" in *list-gpu-arch*) echo compute_90 ;; *) {refusal} ;; esac')
    code, output = configure(tmp_path / "build", "-DCCE_CUDA=ON", CUDACXX=str(nvcc), CUDAHOSTCXX="/opt/g++-99")
    assert code != 0
    assert "refuses the C++ compiler /opt/g++-99: unsupported GNU version! gcc versions later than 15" in output
    assert "Set CUDAHOSTCXX to one that it accepts" in output


@needs_cmake
def test_an_nvcc_that_does_not_run(tmp_path):
    nvcc = program(tmp_path, "nvcc", "echo 'no libc of this age' >&2; exit 1")
    code, output = configure(tmp_path / "build", "-DCCE_CUDA=AUTO", CUDACXX=str(nvcc))
    assert code != 0
    assert f"{nvcc} does not run: no libc of this age" in output


@needs_cmake
@pytest.mark.slow
def test_architectures(tmp_path):
    """Those of the GPUs that are there; all, with PTX for what lies between and what comes, where nvcc lacks one."""
    if not any(map(shutil.which, ("nvcc", "/usr/local/cuda/bin/nvcc"))):
        pytest.skip("there is no nvcc")
    import torch

    options = ("-DCCE_CUDA=ON", f"-DCCE_TORCH_DIR={Path(torch.__file__).parent}")
    everything = r"for 80;86-real;89-real;(90-real;100-real;120|90)( |$)"
    for gpus, archs, expected in (
        ("90", "", "for 90-real( |$)"),
        ("80;90", "", "for 80-real;90-real( |$)"),
        ("90;990", "", everything),
        ("75", "", everything),  # too old for any of the kernels, which then are for other machines
        ("75;90", "", "for 90-real( |$)"),
        ("", "", everything),
        ("90", "86", "for 86( |$)"),
    ):
        code, output = configure(tmp_path, *options, f"-DCCE_GPUS={gpus}", f"-DCCE_CUDA_ARCHS={archs}")
        assert code == 0, output
        assert re.search(r"CUDA kernels by \d+\.\d+\.\d+ " + expected, output), (gpus, archs, output)
        assert ("does not know this machine's sm_990" in output) == ("990" in gpus)
        assert ("nothing is built for this machine's sm_75" in output) == ("75" in gpus)


def test_setup_reports_the_reason(tmp_path):
    """What pip shows: setup.py's own error comes last, after CMake's."""
    if importlib.util.find_spec("setuptools.command.bdist_wheel") is None:
        pytest.skip("this setuptools is too old to build the package: pip isolates the build from it")

    def build(**environment):
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}"],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        return " ".join((done.stdout + done.stderr).split())

    assert "CCE_TORCH_DIR must be the folder of torch >= 2.10" in build(CCE_TORCH_DIR=str(tmp_path))
    assert "MAX_JOBS must be a positive integer, but is 'many'" in build(MAX_JOBS="many")
    if sys.platform == "linux":  # never another compiler than the one that was asked for, in silence
        assert "CCE_CUDA_WHEELS=99.0, but the environment of this build has no such nvcc" in build(
            CCE_CUDA_WHEELS="99.0"
        )
    if shutil.which("cmake"):
        output = build(CCE_CUDA="maybe")
        assert "but is 'maybe'" in output
        assert output.endswith("CMake's configure step failed (exit code 1): its message is above")


# ---- the build backend ----


@pytest.fixture
def backend():
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("cce_build", ROOT / "build_backend" / "cce_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_torch(folder: Path, major: int, minor: int) -> Path:
    header = folder / "torch/include/torch/headeronly/version.h"
    header.parent.mkdir(parents=True)
    header.write_text(f"#define TORCH_VERSION_MAJOR {major}\n#define TORCH_VERSION_MINOR {minor}\n")
    (folder / "torch/lib").mkdir()
    (folder / "torch/lib/libtorch_cpu.so").touch()
    return folder / "torch"


def test_installed_torch_is_not_downloaded(backend):
    assert backend.find_torch() is not None
    assert not [r for r in backend.extra_requirements() if r.startswith("torch")]


def test_missing_or_old_torch_is_downloaded(backend, tmp_path, monkeypatch):
    monkeypatch.delenv("CCE_TORCH_DIR", raising=False)
    for hook in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):
        monkeypatch.setattr(backend._setuptools, hook, lambda settings: [])
    old = fake_torch(tmp_path, 2, 9)
    for folders in ([], [tmp_path / "none"], [old]):
        monkeypatch.setattr(backend, "_candidate_folders", lambda folders=folders: folders)
        assert "torch>=2.10" in backend.extra_requirements()
        assert "torch>=2.10" in backend.get_requires_for_build_wheel()
        assert "torch>=2.10" in backend.get_requires_for_build_editable()
    new = fake_torch(tmp_path / "new", 3, 0)
    monkeypatch.setattr(backend, "_candidate_folders", lambda: [old, new])
    assert backend.find_torch() == new


def test_torch_hidden_by_isolation_is_found(backend, tmp_path, monkeypatch):
    """In pip's isolated environment torch cannot be imported; the environment's folders still lead to it."""
    monkeypatch.delenv("CCE_TORCH_DIR", raising=False)
    torch = fake_torch(tmp_path, 2, 11)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda key: str(tmp_path))
    assert backend.find_torch() == torch


def test_torch_dir_override(backend, tmp_path, monkeypatch):
    torch = fake_torch(tmp_path, 2, 12)
    monkeypatch.setenv("CCE_TORCH_DIR", str(torch))
    assert backend.find_torch() == torch
    monkeypatch.setenv("CCE_TORCH_DIR", str(fake_torch(tmp_path / "old", 2, 9)))
    with pytest.raises(RuntimeError, match=r"CCE_TORCH_DIR must be .* torch >= 2\.10, but .* has torch 2\.9"):
        backend.find_torch()


# ---- the CUDA compiler from PyPI ----


@pytest.fixture
def machine(backend, monkeypatch):
    """A Linux machine without nvcc and GPU, and without a word on CUDA in its environment."""
    for name in ("CCE_CUDA", "CCE_CUDA_WHEELS", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backend.sys, "platform", "linux")
    monkeypatch.setattr(backend.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(backend, "gpu_architectures", list)
    return backend


def torch_for(folder: Path, cuda: str | None, annotation: str = ": Optional[str]") -> Path:
    torch = fake_torch(folder, 2, 13)
    (torch / "version.py").write_text(
        f"__all__ = ['__version__', 'cuda']\n__version__ = '2.13.0'\ncuda{annotation} = {cuda!r}\nhip = '6.4'\n"
    )
    return torch


def test_the_cuda_of_torch(backend, tmp_path):
    assert backend.torch_cuda(torch_for(tmp_path / "a", "13.0")) == (13, 0)
    assert backend.torch_cuda(torch_for(tmp_path / "b", "12.8", annotation="")) == (12, 8)
    assert backend.torch_cuda(torch_for(tmp_path / "c", None)) is None
    assert backend.torch_cuda(fake_torch(tmp_path / "d", 2, 13)) is None
    assert backend.torch_cuda(None) is None
    import torch

    ours = torch.version.cuda
    assert backend.torch_cuda(Path(torch.__file__).parent) == (ours and tuple(int(x) for x in ours.split(".")))


def test_the_compiler_comes_with_a_torch_that_has_cuda(machine, tmp_path, monkeypatch):
    with_cuda, old, without = (torch_for(tmp_path / str(cuda), cuda) for cuda in ("13.2", "12.8", None))
    assert machine.cuda_wheels(with_cuda) == (13, 2)
    assert machine.cuda_wheels(old) is None
    assert machine.cuda_wheels(without) is None
    assert machine.cuda_wheels(None) is None
    monkeypatch.setattr(machine, "_candidate_folders", lambda: [with_cuda])
    monkeypatch.delenv("CCE_TORCH_DIR", raising=False)
    assert set(machine.cuda_requirements((13, 2))) <= set(machine.extra_requirements())

    monkeypatch.setattr(machine, "gpu_architectures", lambda: ["90"])
    assert machine.cuda_wheels(None) == (13, 0)  # torch comes with the installation, the GPU is there
    assert machine.cuda_wheels(without) is None
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert machine.cuda_wheels(with_cuda) is None


def test_the_compiler_comes_when_asked_for(machine, tmp_path, monkeypatch):
    with_cuda, old, without = (torch_for(tmp_path / str(cuda), cuda) for cuda in ("13.2", "12.8", None))
    monkeypatch.setenv("CCE_CUDA", "ON")
    assert [machine.cuda_wheels(torch) for torch in (with_cuda, without, None)] == [(13, 2), (13, 0), (13, 0)]
    assert machine.cuda_wheels(old) is None  # CMake says what is missing
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    assert machine.cuda_wheels(with_cuda) is None
    monkeypatch.setenv("CCE_CUDA_WHEELS", "13.1")
    assert [machine.cuda_wheels(torch) for torch in (with_cuda, old, without, None)] == [(13, 1)] * 4
    monkeypatch.setenv("CCE_CUDA", "OFF")
    assert machine.cuda_wheels(with_cuda) is None


@pytest.mark.parametrize("value", ["13", "yes", "12.8", "13.0.1"])
def test_bad_cce_cuda_wheels(machine, monkeypatch, value):
    monkeypatch.setenv("CCE_CUDA_WHEELS", value)
    with pytest.raises(RuntimeError, match=f"CCE_CUDA_WHEELS must be a version of CUDA such as 13.0, but is '{value}'"):
        machine.cuda_wheels(None)


@pytest.mark.parametrize(
    ("release", "taken"), [("release 13.0, V13.0.88", False), ("release 12.0, V12.0.1", False), ("release 11.8", True)]
)
def test_the_machines_own_nvcc_comes_first_unless_it_is_too_old(machine, tmp_path, monkeypatch, release, taken):
    nvcc = program(tmp_path / "bin", "nvcc", f"echo 'Copyright (c) 2005-2025 NVIDIA'; echo 'Cuda tools, {release}'")
    monkeypatch.setattr(
        machine.shutil, "which", lambda name, path=None: str(nvcc) if name in ("nvcc", str(nvcc)) else None
    )
    assert machine.cuda_wheels(torch_for(tmp_path, "13.0")) == ((13, 0) if taken else None)


def test_the_wheels_are_of_one_minor_version(backend):
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in backend.cuda_requirements((13, 2))]
    assert len(requirements) == 5
    for requirement in requirements:
        fits = [version for version in ("13.0.88", "13.1.9", "13.2.51", "13.3.3") if version in requirement.specifier]
        # The headers of CCCL have fewer releases than the toolkit: their newest up to it is taken.
        assert fits[-1] == "13.2.51" and (len(fits) == 1 or requirement.name == "nvidia-cuda-cccl")


def test_the_nvcc_of_wheels_is_found(backend, tmp_path, monkeypatch):
    assert backend.find_wheels_nvcc((99, 0)) is None
    for folder in ("other", "site"):
        (tmp_path / folder / "nvidia").mkdir(parents=True)
    (tmp_path / "site/nvidia/cu13/bin").mkdir(parents=True)
    nvcc = program(tmp_path / "site/nvidia/cu13/bin", "nvcc", "true")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(tmp_path / "other"))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert backend.find_wheels_nvcc((13, 0)) == nvcc


class Driver:
    """libcuda.so.1 of a machine with these compute capabilities."""

    def __init__(self, *capabilities: tuple[int, int], error: int = 0):
        self.capabilities, self.error = capabilities, error

    def cuInit(self, flags):
        return self.error

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = ordinal
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.capabilities[device.value][{75: 0, 76: 1}[attribute]]
        return 0


def test_the_gpus_of_the_machine(backend, monkeypatch):
    def gpus(driver):
        monkeypatch.setattr(backend.ctypes, "CDLL", lambda name: driver)
        return backend.gpu_architectures()

    assert gpus(Driver((9, 0), (8, 0), (12, 0), (9, 0))) == ["80", "90", "120"]
    assert gpus(Driver()) == []
    assert gpus(Driver((9, 0), error=100)) == []  # CUDA_ERROR_NO_DEVICE
    assert gpus(object()) == []
    monkeypatch.undo()
    assert all(x.isdecimal() for x in backend.gpu_architectures())  # of this machine, whatever it has


def test_without_kernels_although_torch_has_cuda(backend, tmp_path):
    def why(cuda, *lines):
        (tmp_path / "CMakeCache.txt").write_text("\n".join(("CCE_CUDA:STRING=AUTO", *lines)))
        return backend.why_without_kernels(torch_for(tmp_path / f"{cuda}{len(lines)}", cuda), tmp_path)

    missing = "CCE_WITHOUT_CUDA:INTERNAL=there is no nvcc"
    assert why(None, missing) is None
    assert why("13.0") is None
    assert why("13.0", missing, "").startswith("torch is built for CUDA 13.0, but there is no nvcc. Install")
    assert "CCE_CUDA_WHEELS=13.0" in why("12.8", missing)


# ---- the built library ----


@pytest.fixture(scope="module")
def library() -> Path:
    import cce_ext

    return Path(cce_ext.__file__).with_name("_C.abi3.so")


def symbols(library: Path, *options: str) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    listing = subprocess.run(["nm", "-D", *options, str(library)], capture_output=True, text=True, check=True)
    return [line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="nm -D reads ELF files")
class TestSymbols:
    def test_exports_nothing(self, library):
        assert symbols(library, "--defined-only") == []

    def test_needs_neither_python_nor_cuda(self, library):
        wanted = symbols(library, "--undefined-only")
        assert any(name.startswith("aoti_torch_") for name in wanted)
        # cudart is linked statically and finds the driver itself; libtorch_cuda is looked up when it is there
        assert not [name for name in wanted if re.match(r"_?Py[A-Z_]|cuda[A-Z]|cu[A-Z]", name)]

    def test_uses_only_the_stable_abi_of_torch(self, library):
        mangled = [name for name in symbols(library, "--undefined-only") if name.startswith("_Z")]
        assert not [name for name in mangled if re.search(r"c10|2at|5torch", name)]

    def test_loads_only_libtorch_cpu(self, library):
        if shutil.which("readelf") is None:
            pytest.skip("readelf (binutils) is not installed")
        dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True)
        needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic.stdout)
        assert [name for name in needed if re.search("torch|cu|python", name)] == ["libtorch_cpu.so"]
        assert "RPATH" not in dynamic.stdout and "RUNPATH" not in dynamic.stdout


def test_build_info(library):
    import torch

    info = json.loads(torch.ops.cce.build_info())
    assert set(info) == {"cuda", "cuda_version", "cuda_archs", "torch_built_with", "torch_target", "compiler"}
    assert info["torch_target"] == "2.10"
    assert info["cuda"] == bool(info["cuda_archs"]) == (info["cuda_version"] is not None)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", info["torch_built_with"])


def test_wheel_tag(library):
    """Installed from a wheel that serves every Python of this platform."""
    # In a clone setuptools leaves metadata of its own, which are found as well.
    found = importlib.metadata.distributions(name="cce_ext")
    metadata = next(text for text in (x.read_text("WHEEL") for x in found) if text)
    assert re.findall(r"^Tag: (.*)$", metadata, re.MULTILINE)[0].startswith("py3-none-")
    assert "Root-Is-Purelib: false" in metadata
    assert "Tag: py3-none-any" not in metadata


# ---- a clone, and where its tools can be run from ----


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The tree as a clone has it: what git tracks, with nothing built in it."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git clone")
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    folder = tmp_path_factory.mktemp("clone") / "cce_ext"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():  # not what the working tree has deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def environment_without_cce(folder: Path) -> Path:
    """The interpreter of a new environment: links to all of this one's packages, but no cce_ext.

    A path to this one's folder would not do: its cce_ext, where a wheel installed it, comes before the finder
    of an editable install.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    own = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    for packages in (Path(path) for path in sys.path if path.endswith("site-packages")):
        for entry in packages.iterdir():
            link = Path(own, entry.name)
            if "cce_ext" not in entry.name and not link.exists():
                link.symlink_to(entry)
    return python


def run(python: Path, folder: Path, *arguments: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [str(python), *arguments], cwd=folder, env=kept | {"CCE_CUDA": "OFF"}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{arguments} in {folder}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_a_clone_without_its_library_says_so(clone):
    done = subprocess.run([sys.executable, "-c", "import cce_ext"], cwd=clone, capture_output=True, text=True)
    assert done.returncode != 0 and "run `pip install .`" in done.stderr


@pytest.mark.slow
def test_a_build_without_kernels_says_so(clone, tmp_path):
    """A torch with CUDA, no nvcc: the last line of setup.py names the reason."""
    import torch

    own = Path(torch.__file__).parent
    folder = tmp_path / "torch"
    folder.mkdir()
    for name in ("include", "lib"):
        (folder / name).symlink_to(own / name)
    (folder / "version.py").write_text("cuda = '13.0'\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}"],
        cwd=clone,
        env={**os.environ, "CCE_CUDA": "AUTO", "CUDA_HOME": "/nonexistent", "CCE_TORCH_DIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = "cce_ext is built WITHOUT its CUDA kernels: torch is built for CUDA 13.0, but CUDA_HOME is '/nonexistent'"
    assert done.stdout.rstrip().splitlines()[-1].startswith(said)


@pytest.mark.slow
def test_a_build_takes_the_compiler_that_it_is_told(clone, tmp_path):
    """And not the one that CMake knows from the last build in the same folder, nor one that is gone since."""
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("there is no toolkit in /usr/local/cuda")
    import torch

    toolkits = [tmp_path / "first", tmp_path / "second"]
    for toolkit in toolkits:  # what --list-gpu-arch and the rest say is the real one's; only the path is another
        toolkit.mkdir()
        for part in Path("/usr/local/cuda").iterdir():
            if part.name != "bin":
                (toolkit / part.name).symlink_to(part)
        (toolkit / "bin").mkdir()
        program(toolkit / "bin", "nvcc", 'exec /usr/local/cuda/bin/nvcc "$@"')
    # The configure step alone: cmake builds nothing where it is asked for no target.
    real = shutil.which("cmake")
    cmake = program(tmp_path / "path", "cmake", f'[ "$1" = --build ] && exit 0; exec {real} "$@"')
    environment = {**os.environ, "PATH": f"{cmake.parent}{os.pathsep}{os.environ['PATH']}", "CCE_CUDA": "ON"}
    environment |= {"CCE_CUDA_ARCHS": "90-real", "CCE_TORCH_DIR": str(Path(torch.__file__).parent)}
    library = tmp_path / "lib" / "cce_ext" / "_C.abi3.so"
    library.parent.mkdir(parents=True)
    library.touch()

    def known(toolkit):
        command = [
            sys.executable,
            "setup.py",
            "build_ext",
            f"--build-temp={tmp_path}/bt",
            f"--build-lib={tmp_path}/lib",
        ]
        library = tmp_path / "lib" / "cce_ext" / "_C.abi3.so"
        library.parent.mkdir(exist_ok=True)
        library.touch()
        done = subprocess.run(
            command, cwd=clone, env=environment | {"CUDA_HOME": str(toolkit)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (file,) = tmp_path.glob("bt/*/CMakeFiles/*/CMakeCUDACompiler.cmake")
        return re.search(r'set\(CMAKE_CUDA_COMPILER "(.*)"\)', file.read_text())[1], "--fresh" in done.stdout

    first, second = (str(toolkit / "bin" / "nvcc") for toolkit in toolkits)
    known(toolkits[0])
    assert known(toolkits[1]) == (second, True)
    assert known(toolkits[1]) == (second, False)
    shutil.rmtree(toolkits[1])
    assert known(toolkits[0]) == (first, True)
    (clone / "cce_ext" / library.name).unlink()


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["pip install .", "pip install -e ."])
def test_from_a_clone_and_from_elsewhere(clone, editable, tmp_path):
    if importlib.util.find_spec("setuptools.command.bdist_wheel") is None:
        pytest.skip("this setuptools is too old to build the package: pip isolates the build from it")
    (clone / "cce_ext" / "_C.abi3.so").unlink(missing_ok=True)
    python = environment_without_cce(tmp_path / "environment")
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run(Path(sys.executable), clone, *install, *(["-e"] if editable else []), ".")
    assert (clone / "cce_ext" / "_C.abi3.so").exists()
    if editable and shutil.which("ninja"):  # the next one compiles what has changed: here nothing
        log = clone / "build" / "editable" / "cmake-ninja" / ".ninja_log"
        compiled = [log.read_text().count(".cpp.o")]
        run(Path(sys.executable), clone, *install, "-e", ".")
        compiled.append(log.read_text().count(".cpp.o"))
        assert compiled[0] == compiled[1] > 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    loss = (
        "import cce_ext, torch; e, c, t = torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 2]); "
        "print(cce_ext.linear_cross_entropy(e, c, t), cce_ext.__file__)"
    )
    for folder in (clone, elsewhere):
        answer = run(python, folder, "-c", loss)
        assert answer.startswith("tensor(1.0986)")
        assert answer.rstrip().endswith(str(Path("cce_ext", "__init__.py")))
        assert (str(clone) in answer) == (folder == clone or editable)
        assert "--device" in run(python, folder, "-m", "cce_ext", "--help")
    if editable:  # what follows runs in the clone, where either way the package is the clone's
        return
    for arguments in (
        ["-m", "bench", "--help"],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_layers.py"],
        ["examples/train.py", "--help"],
    ):
        run(python, clone, *arguments)
