"""An export gives the output of the released model, wherever it is opened, or there is no export."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import contracts
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
import torch
from crashes import killed_at
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from monai.bundle import ConfigParser, ConfigWorkflow, load, verify_net_in_out
from monai.bundle.properties import InferProperties, MetaProperties
from monai.utils import BundleProperty, BundlePropertyConfig
from PIL import Image
from releases import CONSORTIUM, plan_of, publish
from safetensors.torch import load_file
from torch import nn

from client.data.images import read_nifti, read_picture
from client.data.preprocessing import prepare
from client.data.scan import stacked
from server import export as export_module
from server.export import TOLERANCE, check, export, export_monai_bundle, export_onnx
from shared_models.errors import FederadError
from shared_models.release import CARD, MANIFEST, MODEL, Release, verify_manifest
from shared_models.task import task_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:(?s).*parsing config_file:UserWarning"),  # MONAI warns of every bundle
    pytest.mark.filterwarnings("ignore:.*nvImageCodec:UserWarning"),  # an optional decoder of MONAI
]

KEY = Ed25519PrivateKey.generate()

PLANS = {
    "2-D": plan_of(),
    "3-D, flat patch, two sequences, three labels": plan_of(
        dimensions=3,
        channels=(4, 8, 8, 16),
        task={"labels": ["background", "core", "edema"], "residual_units": 2},
        data={"patch": [8, 32, 48], "channels": ["flair", "t1c"]},
    ),
    "photographs": plan_of(task={"residual_units": 0}, data={"modality": "OP", "channels": ["red", "green", "blue"]}),
}
"""Plans of every kind that this version trains."""


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> dict[str, Release]:
    """A release of each plan."""
    folder = tmp_path_factory.mktemp("releases")
    return {name: publish(folder, KEY, plan) for name, plan in PLANS.items()}


@pytest.fixture(scope="module")
def bundles(releases, tmp_path_factory) -> dict[str, Path]:
    """Each of them as a MONAI bundle."""
    folder = tmp_path_factory.mktemp("bundles")
    made = {name: folder / f"bundle-{i}" for i, name in enumerate(releases)}
    for name, release in releases.items():
        export(release, made[name], with_pickle=True)
    return made


@pytest.fixture(scope="module")
def onnx_files(releases, tmp_path_factory) -> dict[str, Path]:
    """Each of them as ONNX."""
    folder = tmp_path_factory.mktemp("onnx")
    made = {name: folder / f"model-{i}.onnx" for i, name in enumerate(releases)}
    for name, release in releases.items():
        export(release, made[name])
    return made


def images_for(plan, *, seed: int = 7):
    """Images of sizes and batches that the export itself did not try."""
    rng = np.random.default_rng(seed)
    stride, n = 2 ** (len(plan.task.channels) - 1), plan.data.dimensions
    for sides, batch in (((5, 6, 4), 1), ((2, 3, 2), 4), ((1, 7, 5), 2), ((9, 2, 3), 1)):
        yield rng.standard_normal((batch, len(plan.data.channels), *(stride * k for k in sides[-n:])), np.float32)


def output_of(network, image):
    with torch.inference_mode():
        return network(torch.from_numpy(image)).numpy()


def code_of(work) -> str:
    """The number of the error that ends ``work``."""
    with pytest.raises(FederadError) as caught:
        work()
    assert caught.value.remedies
    return caught.value.code


@pytest.mark.parametrize("name", PLANS)
class TestOnnx:
    def test_gives_the_output_of_the_release_at_any_size(self, name, releases, onnx_files):
        """
        ONNX Runtime agrees within 1e-4 on batches and sizes that nobody tried before.
        """
        network = releases[name].network()
        session = onnxruntime.InferenceSession(onnx_files[name], providers=["CPUExecutionProvider"])
        for image in images_for(PLANS[name]):
            theirs = session.run(["logits"], {"image": image})[0]
            assert np.abs(theirs - output_of(network, image)).max() <= TOLERANCE

    def test_agrees_on_a_head_in_a_black_volume(self, name, releases, onnx_files):
        """
        Mostly zeros, as every brain scan is: there the runtime's own instance normalisation loses its digits.
        """
        plan = PLANS[name]
        image = np.zeros((1, len(plan.data.channels), *(64 for _ in plan.data.patch)), np.float32)
        image[(..., *(slice(20, 30) for _ in plan.data.patch))] = 2.0
        session = onnxruntime.InferenceSession(onnx_files[name], providers=["CPUExecutionProvider"])
        theirs = session.run(["logits"], {"image": image})[0]

        assert np.abs(theirs - output_of(releases[name].network(), image)).max() <= TOLERANCE

    def test_file_is_valid_alone_and_says_what_it_is(self, name, releases, onnx_files):
        """
        ONNX's own checker takes it, all weights are inside, and plan, labels and release stand in its metadata.
        """
        model = onnx.load(onnx_files[name], load_external_data=False)
        onnx.checker.check_model(model, full_check=True)
        said = {entry.key: entry.value for entry in model.metadata_props}

        assert said["federad.release"] == releases[name].sha256
        assert said["federad.plan"] == PLANS[name].canonical_json()
        assert json.loads(said["federad.labels"]) == list(PLANS[name].task.labels)
        assert not [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert not any("/" in value or "\\" in value for value in said.values() if str(Path.cwd()) in value)

    def test_batch_and_sides_are_free_and_channels_are_not(self, name, onnx_files):
        """
        The shape in the file has a name where a number would fix it.
        """
        shape = onnxruntime.InferenceSession(onnx_files[name]).get_inputs()[0].shape

        assert shape[1] == len(PLANS[name].data.channels)
        assert all(isinstance(side, str) for side in [shape[0], *shape[2:]])


@pytest.mark.parametrize("name", PLANS)
class TestBundle:
    def test_loads_with_monai_and_gives_the_same_output(self, name, releases, bundles):
        """
        ``monai.bundle.load`` makes our network with our weights: the same numbers.
        """
        bundle = bundles[name]
        network = load(bundle.name, bundle_dir=bundle.parent, workflow_type="inference", device="cpu").eval()
        for image in images_for(PLANS[name]):
            np.testing.assert_allclose(
                output_of(network, image), output_of(releases[name].network(), image), atol=TOLERANCE, rtol=0
            )

    def test_its_own_configuration_reads_the_signed_weights(self, name, releases, bundles, tmp_path):
        """
        Without ``model.pt`` the inference configuration gives the same output, from the file that was signed.
        """
        bundle = shutil.copytree(bundles[name], tmp_path / "passed-on")
        (bundle / "models" / "model.pt").unlink()
        network = workflow_of(bundle).parser.get_parsed_content("network")
        for image in images_for(PLANS[name]):
            np.testing.assert_allclose(
                output_of(network, image), output_of(releases[name].network(), image), atol=TOLERANCE, rtol=0
            )

    def test_has_the_parts_that_the_specification_wants(self, name, bundles):
        """
        Metadata, inference, weights and a page; what MONAI looks for in a bundle is there.
        """
        bundle = bundles[name]
        assert {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()} == {
            "configs/metadata.json",
            "configs/inference.json",
            "models/model.pt",
            "models/model.safetensors",
            "docs/README.md",
            f"docs/{MANIFEST}",
            f"docs/{CARD}",
        }
        wanted = {
            *("version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task"),
            *("description", "authors", "copyright", "network_data_format"),
        }
        assert wanted <= json.loads((bundle / "configs" / "metadata.json").read_text()).keys()
        parser = workflow_of(bundle).parser
        for properties in (InferProperties, MetaProperties):
            assert all(p[BundlePropertyConfig.ID] in parser for p in properties.values() if p[BundleProperty.REQUIRED])
        verify_net_in_out(
            net_id="network_def",
            meta_file=str(bundle / "configs" / "metadata.json"),
            config_file=str(bundle / "configs" / "inference.json"),
            device="cpu",
        )

    def test_receiver_can_check_the_weights(self, name, releases, bundles):
        """
        The safetensors file is the signed one, byte for byte, and the signed manifest lies beside it.
        """
        bundle = bundles[name]
        signed = Release.open(bundle / "docs").signed
        manifest = verify_manifest(signed, KEY.public_key(), CONSORTIUM)
        data = (bundle / "models" / MODEL).read_bytes()

        assert hashlib.sha256(data).hexdigest() == manifest.file(MODEL).sha256 == releases[name].sha256

    def test_prepares_and_predicts_as_a_hospital_does(self, name, releases, bundles, tmp_path):
        """
        A volume stored along odd axes, or a photograph: the same network input and the same labels as at a site.
        """
        plan = PLANS[name]
        bundle = shutil.copytree(bundles[name], tmp_path / "bundle")
        scan = put_image(bundle / "input", plan)
        volume = prepare(scan, plan.data)
        ours = task_for(plan).predict(releases[name].network(), volume, torch.device("cpu"))
        parser = workflow_of(bundle).parser
        prepared = parser.get_parsed_content("dataset")[0]["image"]
        logits = parser.get_parsed_content("inferer")(prepared[None], parser.get_parsed_content("network"))
        flat = plan.data.modality == "OP"

        np.testing.assert_allclose(
            prepared.numpy()[:, None] if flat else prepared.numpy(), volume.image, atol=1e-5, rtol=0
        )
        theirs = logits.argmax(dim=1).numpy()
        assert (theirs == ours).mean() > 0.9999  # a tie may fall either way


class TestBundleOutput:
    def test_labels_come_back_on_the_grid_of_the_image(self, bundles, releases, tmp_path):
        """
        The label map lies on the file's own axes and affine, each voxel with the label that a site gives it.
        """
        import nibabel

        plan = PLANS["2-D"]
        bundle = shutil.copytree(bundles["2-D"], tmp_path / "bundle")
        scan = put_image(bundle / "input", plan)
        ours = task_for(plan).predict(releases["2-D"].network(), prepare(scan, plan.data), torch.device("cpu"))
        parser = workflow_of(bundle).parser
        item = parser.get_parsed_content("dataset")[0]
        logits = parser.get_parsed_content("inferer")(item["image"][None], parser.get_parsed_content("network"))
        parser.get_parsed_content("postprocessing")({"image": item["image"], "pred": logits[0]})
        (file,) = (bundle / "output").rglob("*.nii.gz")
        written = read_nifti(file)

        assert nibabel.load(file).get_data_dtype() == np.uint8
        np.testing.assert_allclose(written.affine, scan.affine)
        np.testing.assert_array_equal(as_stored(ours), written.image[0].transpose(2, 1, 0))

    def test_two_patients_with_two_sequences_each_do_not_overwrite_each_other(self, bundles, tmp_path):
        """
        Files have the same names in every patient's folder, and so have the results.
        """
        name = "3-D, flat patch, two sequences, three labels"
        bundle = shutil.copytree(bundles[name], tmp_path / "bundle")
        put_image(bundle / "input", PLANS[name])
        shutil.copytree(bundle / "input" / "head", bundle / "input" / "other")
        parser = workflow_of(bundle).parser
        for item in parser.get_parsed_content("dataset"):
            logits = parser.get_parsed_content("inferer")(item["image"][None], parser.get_parsed_content("network"))
            parser.get_parsed_content("postprocessing")({"image": item["image"], "pred": logits[0]})

        written = [file.relative_to(bundle / "output").parts[0] for file in (bundle / "output").rglob("*.nii.gz")]
        assert sorted(written) == ["head", "other"]


def workflow_of(bundle: Path) -> ConfigWorkflow:
    return ConfigWorkflow(
        config_file=str(bundle / "configs" / "inference.json"),
        workflow_type="inference",
        logging_file=False,
        bundle_root=str(bundle),
        device="cpu",
    )


AFFINE = np.array([[0, 1.1, 0, 5], [-1.2, 0, 0, 3], [0, 0, -2.4, -7], [0, 0, 0, 1.0]])
"""To RAS mm: the first axis goes to the back, the second to the right, the third to the feet."""


def as_stored(labels):
    """Labels ``(z, y, x)`` along the axes of :data:`AFFINE`, by hand: i = y, j = x reversed, k = z reversed."""
    return labels.transpose(1, 2, 0)[:, ::-1, ::-1]


def put_image(folder: Path, plan):
    """Write an image as a hospital might have it, and read it as a site does."""
    import nibabel

    rng = np.random.default_rng(3)
    folder.mkdir()
    if plan.data.modality == "OP":
        Image.fromarray((rng.random((50, 70, 3)) * 255).astype(np.uint8)).save(folder / "eye.png")
        return read_picture(folder / "eye.png", plan.data.channels)
    names = [f"head/{c}.nii.gz" for c in plan.data.channels] if len(plan.data.channels) > 1 else ["head.nii.gz"]
    for name in names:
        values = (rng.standard_normal((40, 36, 24)) * 100).astype(np.float32)
        values[:8] = 0
        (folder / name).parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(values, AFFINE), folder / name)
    return stacked([read_nifti(folder / name) for name in names])


class TestResampled:
    @pytest.mark.parametrize(
        ("dimensions", "spacing"), [(2, [1.5, 2.0]), (3, [2.0, 1.5, 1.0])], ids=["2-D in plane", "3-D"]
    )
    def test_spacing_of_the_plan_is_reached_as_a_hospital_reaches_it(self, dimensions, spacing, tmp_path):
        """
        Each number of spacing_mm belongs to the same axis there and here.
        """
        plan = plan_of(dimensions=dimensions, data={"spacing_mm": spacing})
        bundle = tmp_path / "bundle"
        export_monai_bundle(publish(tmp_path / "releases", KEY, plan), bundle)
        volume = prepare(put_image(bundle / "input", plan), plan.data)
        prepared = workflow_of(bundle).parser.get_parsed_content("dataset")[0]["image"]

        np.testing.assert_allclose(prepared.numpy(), volume.image, atol=1e-4, rtol=0)


class TestPickle:
    def test_bundle_without_a_pickle_still_gives_the_output(self, releases, tmp_path):
        """
        Unless somebody asks for one there is no pickle anywhere, and the check has passed.
        """
        worst = export(releases["2-D"], tmp_path / "bundle")

        assert worst <= TOLERANCE
        assert not list(tmp_path.rglob("*.pt"))
        assert "model.pt" not in (tmp_path / "bundle" / "docs" / "README.md").read_text()

    def test_pickle_holds_tensors_and_nothing_else(self, bundles):
        """
        Opened with ``weights_only`` it is the signed weights; the page warns of it.
        """
        bundle = bundles["2-D"]
        pickled = torch.load(bundle / "models" / "model.pt", weights_only=True)
        signed = load_file(bundle / "models" / MODEL)

        assert pickled.keys() == signed.keys()
        assert all(torch.equal(pickled[name], signed[name]) for name in signed)
        assert "delete it before you pass the bundle on" in (bundle / "docs" / "README.md").read_text()
        with zipfile.ZipFile(bundle / "models" / "model.pt") as archive:
            assert sum(name.endswith(".pkl") for name in archive.namelist()) == 1


class TestCheck:
    def test_bundle_that_describes_another_network_is_not_written(self, releases, tmp_path, monkeypatch):
        """
        Same parameters, another constant in the normalisation: the outputs differ and nothing is written.
        """

        def described(plan):
            return {**export_module._unet(plan), "norm": ["INSTANCE", {"affine": True, "eps": 0.1}]}

        monkeypatch.setattr(export_module, "_DEFINITIONS", {"unet": described})

        assert code_of(lambda: export(releases["2-D"], tmp_path / "bundle")) == "S205"
        assert not list(tmp_path.iterdir())

    def test_onnx_file_that_computes_something_else_is_not_written(self, releases, tmp_path, monkeypatch):
        """
        A layer that is translated wrongly is found, whatever it is.
        """

        class Wrong(export_module.CarefulInstanceNorm):
            def forward(self, image):
                return super().forward(image) * 1.001

        monkeypatch.setattr(export_module, "CarefulInstanceNorm", Wrong)

        assert code_of(lambda: export(releases["2-D"], tmp_path / "model.onnx")) == "S205"
        assert not list(tmp_path.iterdir())

    def test_model_whose_output_is_not_finite_is_not_exported(self, tmp_path):
        """
        Finite weights can overflow: two outputs that are both infinite are no agreement.
        """
        network = nn.Conv2d(1, 2, 1)
        nn.init.constant_(network.weight, 3e38)

        assert code_of(lambda: check(network, PLANS["2-D"], lambda image: output_of(network, image), "x")) == "S205"

    def test_export_that_gives_no_number_is_refused(self):
        """
        Not a number is as far from the output as can be.
        """
        network = nn.Conv2d(1, 2, 1)

        for wrong in (np.float32(np.nan), np.float32(np.inf)):
            assert (
                code_of(lambda w=wrong: check(network, PLANS["2-D"], lambda im: output_of(network, im) * w, "x"))
                == "S205"
            )

    def test_output_of_another_shape_is_refused(self):
        """
        Also where NumPy would make the shapes fit.
        """
        network = nn.Conv2d(1, 2, 1)
        for parameter in network.parameters():
            nn.init.ones_(parameter)

        assert code_of(lambda: check(network, PLANS["2-D"], lambda im: output_of(network, im)[:, :1], "x")) == "S205"

    def test_difference_is_measured_and_reported(self):
        """
        What passes is told with its largest difference.
        """
        network = nn.Conv2d(1, 2, 1)
        worst = check(network, PLANS["2-D"], lambda image: output_of(network, image) + np.float32(5e-5), "x")

        assert worst == pytest.approx(5e-5, rel=0.05)


class TestCarefulInstanceNorm:
    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 3, 4, 8, 12)])
    def test_agrees_with_torch_in_double_precision(self, shape, affine):
        """
        It is instance normalisation, to the last digits.
        """
        norm = (nn.InstanceNorm2d if len(shape) == 4 else nn.InstanceNorm3d)(3, affine=affine).double()
        if affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        image = torch.randn(shape, dtype=torch.float64)

        torch.testing.assert_close(export_module.CarefulInstanceNorm(norm)(image), norm(image), atol=1e-12, rtol=0)

    def test_keeps_its_digits_where_a_channel_is_nearly_constant(self):
        """
        A large constant with a little on it: closer to double precision than 1e-4.
        """
        image = torch.full((1, 1, 64, 64, 64), 10.0)
        image[..., :4, :4, :4] += torch.randn(4, 4, 4)
        norm = nn.InstanceNorm3d(1, affine=True)
        careful = export_module.CarefulInstanceNorm(norm)(image)

        assert (careful - norm.double()(image.double())).abs().max() < 1e-4

    def test_released_network_stays_as_it_is(self, releases):
        """
        The exchange of layers happens in a copy.
        """
        network = releases["2-D"].network()
        before = Counter(type(module) for module in network.modules())
        export_module._careful(network)

        assert Counter(type(module) for module in network.modules()) == before


class TestTarget:
    def test_suffix_decides_the_form(self, releases, tmp_path):
        """
        ``.onnx`` in any spelling is ONNX, everything else a bundle; missing folders are made.
        """
        export(releases["2-D"], tmp_path / "new" / "folder" / "model.ONNX")
        export(releases["2-D"], tmp_path / "new" / "lesions-2.0")

        assert (tmp_path / "new" / "folder" / "model.ONNX").is_file()
        assert (tmp_path / "new" / "lesions-2.0" / "configs" / "inference.json").is_file()

    @pytest.mark.parametrize("target", ["there.onnx", "there", "link.onnx"])
    def test_nothing_is_overwritten(self, releases, tmp_path, target):
        """
        A file, a folder, a link that leads nowhere: it stays as it is.
        """
        (tmp_path / "there.onnx").write_text("mine")
        (tmp_path / "there").mkdir()
        (tmp_path / "link.onnx").symlink_to(tmp_path / "nowhere")
        before = sorted(tmp_path.iterdir())

        assert code_of(lambda: export(releases["2-D"], tmp_path / target)) == "S204"
        assert sorted(tmp_path.iterdir()) == before
        assert (tmp_path / "there.onnx").read_text() == "mine"

    @pytest.mark.parametrize("target", ["file/model.onnx", "file/bundle"])
    def test_place_that_cannot_be_written_is_named(self, releases, tmp_path, target):
        """
        S204 with the reason of the system.
        """
        (tmp_path / "file").write_text("")

        assert code_of(lambda: export(releases["2-D"], tmp_path / target)) == "S204"

    @pytest.mark.parametrize("form", [export_onnx, export_monai_bundle])
    def test_damaged_release_is_not_exported(self, releases, tmp_path, form):
        """
        Weights that are not the signed ones go nowhere.
        """
        folder = shutil.copytree(releases["2-D"].folder, tmp_path / "release")
        data = bytearray((folder / MODEL).read_bytes())
        data[-1] ^= 1
        (folder / MODEL).write_bytes(data)

        assert code_of(lambda: form(Release.open(folder), tmp_path / "out.onnx")) == "M215"
        assert not (tmp_path / "out.onnx").exists()

    @pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
    def test_missing_package_is_named(self, releases, tmp_path, monkeypatch, package):
        """
        With the way to install it, and the form of export that does without.
        """
        monkeypatch.setitem(sys.modules, package, None)

        with pytest.raises(FederadError, match=f"S206.*{package}"):
            export_onnx(releases["2-D"], tmp_path / "model.onnx")
        export_monai_bundle(releases["2-D"], tmp_path / "bundle")

    def test_killed_while_exporting_the_target_is_whole_or_not_there(self, releases, tmp_path):
        """
        A bundle that has its name has all of its files.
        """
        whole = {"configs", "models", "docs"}
        seen = []
        for n_lines in range(1, 2000, 12):
            target = tmp_path / str(n_lines) / "bundle"
            killed = killed_at(n_lines, export_module, lambda target=target: export(releases["2-D"], target))
            seen.append(target.exists())
            if seen[-1]:
                assert {path.name for path in target.iterdir()} == whole
                safetensors.numpy.load_file(target / "models" / MODEL)
            if not killed:
                break

        assert seen == sorted(seen)
        assert seen[-1]


class TestNothingCallsHome:
    def test_export_writes_nothing_but_its_target(self, releases, tmp_path):
        """
        No identifier, no cache, no report to the maker of a library, in whatever version that library is.
        """
        work = (
            "import os, sys; from pathlib import Path; from server.export import export; "
            "from shared_models.release import Release; export(Release.open(Path(sys.argv[1])), Path(sys.argv[2])); "
            "print(os.environ['ORT_DISABLE_TELEMETRY'])"
        )
        home = tmp_path / "home"
        home.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", work, releases["2-D"].folder, tmp_path / "model.onnx"],
            cwd=Path(__file__).parents[2],
            env={"PATH": os.environ["PATH"], "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")},
            capture_output=True,
            text=True,
            check=True,
        )

        assert done.stdout.strip() == "1"
        left = [path for path in home.rglob("*") if path.is_file() and "matplotlib" not in path.parts]
        assert not left  # but matplotlib's list of fonts
        assert {path.name for path in tmp_path.iterdir()} == {"home", "model.onnx"}


class TestWords:
    def test_configuration_is_json_that_names_no_machine(self, bundles):
        """
        A bundle tells nothing about where it was made.
        """
        for bundle in bundles.values():
            for file in ("configs/inference.json", "configs/metadata.json", "docs/README.md"):
                assert str(bundle.parent) not in (bundle / file).read_text()
            parser = ConfigParser()
            parser.read_config(bundle / "configs" / "inference.json")
            assert parser["bundle_root"] == "."

    def test_kind_of_task_that_nobody_described_is_refused(self, releases, tmp_path, monkeypatch):
        """
        A bundle that guesses how to read an output is not written.
        """
        monkeypatch.setattr(export_module, "_DESCRIBED_TASKS", ())
        assert code_of(lambda: export(releases["2-D"], tmp_path / "bundle")) == "P104"

        monkeypatch.setattr(export_module, "_DEFINITIONS", {})
        monkeypatch.setattr(export_module, "_DESCRIBED_TASKS", ("segmentation",))
        assert code_of(lambda: export(releases["2-D"], tmp_path / "bundle")) == "P104"

    def test_learned_noise_is_no_label_of_a_bundle(self):
        """
        MONAI's words would take the channel of the noise for a label.
        """
        plan = contracts.example_plan(training={"loss": "heteroscedastic"})

        assert code_of(lambda: export_module.network_definition(plan)) == "P104"


def test_network_trained_against_a_discriminator_is_exported_without_it(tmp_path):
    """
    A release holds all that was signed; what predicts is the plain network, in a bundle too.
    """
    plan = plan_of(adaptation={"adversarial": "scanner"})
    release = publish(tmp_path / "releases", KEY, plan)

    assert any(name.startswith("discriminator.") for name in release.weights())
    assert type(release.network()) is type(task_for(plan_of()).build_network())
    assert export_monai_bundle(release, tmp_path / "bundle") <= TOLERANCE
