"""The rules of the house, read off the source: who may import whom, and what may never be written."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared_models.networks import NETWORKS
from shared_models.tasks import TASKS

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "shared_models": {"shared_models"},
    "client": {"client", "shared_models"},
    "server": {"server", "shared_models"},
    "simulation": {"simulation", "client", "server", "shared_models"},
}
"""The arrows: each package and those of the house that it may import."""

FLOWER_SPOKEN_IN = {"shared_models/parcel.py", "client/app.py", "client/guard.py"}
"""Besides the server, the files in which Flower's own words are used."""

NET_SIDE = ("app", "courier", "enrolment", "guard", "link", "stub")
"""Modules of client/ that the courier's processes run: they have the network, and must not be able to see data."""

ON_THE_SOCKET = {"client/service.py"}
"""The one file of the station's side with a socket: the Unix socket that the courier calls."""

KEPT_HERE = {"client/own.py"}
"""The one file that turns weights into bytes beside the gate: those of a site's own model, which stay on its disk."""

SEES_DATA = (
    "client.own",
    "client.station",
    "client.gate",
    "client.training",
    "client.data",
    "client.answers",
    "client.service",
    "torch",
)

PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}


def sources(*packages: str) -> list[Path]:
    """All source files of packages, or of a package's folder."""
    files = [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]
    assert files
    return files


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, package: str = "") -> Iterator[str]:
    """Dotted name of everything that is imported anywhere in a file, also inside functions and by string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join([*([package] if node.level else []), node.module or ""]).strip(".")
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called(node).split(".")[-1] in {"import_module", "__import__"}:
            yield from (str(arg.value) for arg in node.args if isinstance(arg, ast.Constant))


def called(node: ast.Call) -> str:
    """The dotted name of what is called, as far as it is written out."""
    parts: list[str] = []
    function: ast.expr = node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if isinstance(function, ast.Name):
        parts.append(function.id)
    return ".".join(reversed(parts))


def foreign_imports(text: str, package: str) -> set[str]:
    """Packages of the house that a file of ``package`` may not import and does."""
    tops = {name.split(".")[0] for name in imports(ast.parse(text), package)}
    return (tops & MAY_IMPORT.keys()) - MAY_IMPORT[package]


def unsafe_reading(text: str) -> set[str]:
    """Ways of reading or running code that comes from elsewhere."""
    tree = ast.parse(text)
    found = {name for name in imports(tree) if name.split(".")[0] in PICKLERS}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = called(node)
        if function in {"torch.load", "torch.jit.load", "torch.hub.load", "eval", "exec", "yaml.load"}:
            found.add(function)
        if any(k.arg == "allow_pickle" and not is_false(k.value) for k in node.keywords):
            found.add("allow_pickle")
    found |= {name for name in imports(tree) if name in {"torch.load", "torch.jit.load", "torch.hub.load"}}
    return found


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def words(text: str) -> set[str]:
    """Every name and attribute that is used or imported in a file."""
    tree = ast.parse(text)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return used | {part for name in imports(tree) for part in name.split(".")}


def reachable(module: str) -> set[str]:
    """Modules that importing this one leads to, inside functions too; of foreign packages the first name."""
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        tree = ast.parse(file_of(name).read_text(encoding="utf-8"))  # type: ignore[union-attr]
        for imported in imports(tree, name.rpartition(".")[0]):
            inner = next((n for n in (imported, imported.rpartition(".")[0]) if file_of(n) is not None), None)
            if inner is not None:
                waiting.append(inner)
            else:
                reached.add(imported.split(".")[0])
    return reached


def file_of(module: str) -> Path | None:
    """The file of a module of the house; None for others and for names that are no modules."""
    path = ROOT.joinpath(*module.split("."))
    if not module or module.split(".", maxsplit=1)[0] not in MAY_IMPORT:
        return None
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").is_file() else None


class TestArrows:
    @pytest.mark.parametrize("package", MAY_IMPORT)
    def test_package_imports_what_the_arrows_allow(self, package):
        """
        Server and client meet only through shared_models, and shared_models knows neither.
        """
        broken = {name_of(f): foreign_imports(f.read_text(encoding="utf-8"), package) for f in sources(package)}

        assert not {file: names for file, names in broken.items() if names}

    def test_registered_names_lead_into_shared_models(self):
        """
        What a plan names is found in shared_models too.
        """
        assert all(target.startswith("shared_models.") for target in (NETWORKS | TASKS).values())

    @pytest.mark.parametrize(
        "text",
        [
            "import server.rounds",
            "from server import rounds",
            "def f():\n    from server.journal import Journal",
            "from importlib import import_module\nimport_module('server.app')",
            "import simulation",
        ],
    )
    def test_forbidden_import_is_found_wherever_it_stands(self, text):
        """
        At the top, inside a function, or by string.
        """
        assert foreign_imports(text, "client")


class TestGate:
    def test_only_the_gate_builds_an_outgoing_message(self):
        """
        Nothing else in client/ can make an answer or the bytes of one.
        """
        forbidden = {"Answer", "encode_answer", "encode_ask"}
        builders = {name_of(f) for f in sources("client") if words(f.read_text(encoding="utf-8")) & forbidden}

        assert builders == {"client/gate.py"}

    def test_nothing_else_reaches_the_wire(self):
        """
        No file of the station's side opens a connection, but for its own socket, or turns weights into bytes by itself.
        """
        libraries = {"socket", "requests", "urllib", "http", "smtplib", "ftplib", "grpc", "httpx", "aiohttp", "flwr"}
        net_side = {f"client/{name}.py" for name in NET_SIDE}
        for file in sources("client"):
            names = set(imports(ast.parse(file.read_text(encoding="utf-8")), "client"))
            if name_of(file) not in net_side | ON_THE_SOCKET:
                assert not {name.split(".")[0] for name in names} & libraries, name_of(file)
            assert not {name.split(".")[0] for name in names} & {"safetensors"}, name_of(file)
            if name_of(file) not in KEPT_HERE:
                assert not names & {"shared_models.weights.encode", "shared_models.weights", "shared_models.messages"}

    @pytest.mark.parametrize("module", NET_SIDE)
    def test_courier_knows_nothing(self, module):
        """
        Whatever the courier's processes import, at whatever distance, holds no part of the station or of the data.
        """
        reached = reachable(f"client.{module}")

        assert f"client.{module}" in reached
        assert not {name for name in reached if name.startswith(SEES_DATA)}

    def test_what_is_reached_at_a_distance_is_found(self):
        """
        The station reaches the data through the modules it imports.
        """
        assert {"client.data.cohort", "client.training", "torch"} <= reachable("client.service")

    def test_message_made_elsewhere_is_found(self):
        """
        By name or as an attribute of its module.
        """
        assert "encode_answer" in words("from shared_models.messages import encode_answer as e")
        assert "encode_answer" in words("import shared_models.messages as m\nm.encode_answer(1)")


class TestReading:
    @pytest.mark.parametrize("file", sources("shared_models", "client", "server"), ids=name_of)
    def test_nothing_that_arrives_can_be_run(self, file):
        """
        No pickle, no torch.load, no arrays of objects, no eval: bytes from elsewhere are never code.
        """
        assert not unsafe_reading(file.read_text(encoding="utf-8"))

    @pytest.mark.parametrize(
        "text",
        [
            "import pickle",
            "def f():\n    from pickle import loads",
            "import torch\ntorch.load('x', weights_only=True)",
            "from torch import load",
            "import numpy as np\nnp.load('x', allow_pickle=True)",
            "import numpy as np\nnp.load('x', allow_pickle=trusted)",
            "exec(text)",
        ],
    )
    def test_unsafe_reading_is_found(self, text):
        """
        However it is written.
        """
        assert unsafe_reading(text)

    def test_safe_reading_passes(self):
        """
        Saying no to pickle is no use of pickle.
        """
        assert not unsafe_reading(
            "import numpy as np\nnp.load('x', allow_pickle=False, mmap_mode='r')\nre.compile('x')"
        )


class TestFlower:
    def test_flower_is_spoken_at_the_edge_only(self):
        """
        Flower's records appear in the parcel, the courier and the server; everything else speaks federad's own words.
        """
        speaking = {
            name_of(f)
            for f in sources("shared_models", "client", "server")
            if any(name.split(".")[0] == "flwr" for name in imports(ast.parse(f.read_text(encoding="utf-8"))))
        }

        assert {name for name in speaking if not name.startswith("server/")} == FLOWER_SPOKEN_IN
        assert not {name for name in speaking if name.count("/") > 1}
