"""Releases in the forms that other software reads: a MONAI bundle, or one ONNX file.

Every export is loaded again in that form and must give the same output as our own network before it gets its name: an
export that does not is not written. Sources: the MONAI bundle specification (docs.monai.io, mb_specification) and
ONNX through ``torch.onnx.export(dynamo=True)``, checked with ONNX Runtime.

The bundle specification wants the weights as ``models/model.pt``, which is a pickle: whoever opens a pickle runs what is
in it. So the bundle holds ``models/model.safetensors``, byte for byte the file that was signed, and its
``inference.json`` reads that one. ``model.pt`` with the same tensors, for ``monai.bundle.load`` on this machine, is added
where somebody asks for it; it is not signed, and federad never reads one that came from elsewhere.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.release import CARD, CARD_PAGE, MANIFEST, MODEL, Card, Release
from shared_models.tasks import OF_KSPACE, OF_WHOLE_STUDIES, WITH_NUMBERS
from shared_models.tasks.classification import SHARPNESS, as_seen
from shared_models.tasks.quantification import Quantification
from shared_models.tasks.segmentation import OVERLAP, WINDOWS_AT_ONCE

TOLERANCE = 1e-4
"""Largest error of an export [logits]; see :func:`check`."""

MAX_BATCH = 4096
MAX_SIDE = 65_536
"""Largest batch and longest side of an image that the ONNX file takes [pixels or voxels]."""

ONNX_SUFFIX = ".onnx"

NEEDED_TO_RUN = {"fire": "0.7.1", "nibabel": "5.4.2", "pytorch-ignite": "0.5.5"}
"""What ``monai.bundle run`` needs besides, in the versions with which it was tried."""

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""An exported network: images ``(batch, channel, [z,] y, x)`` to logits ``(batch, label, [z,] y, x)``."""


def export(release: Release, target: Path, *, with_pickle: bool = False) -> float:
    """Write a release as ONNX if ``target`` ends in ``.onnx``, else as a MONAI bundle in the folder ``target``.

    Parameters
    ----------
    with_pickle
        See :func:`export_monai_bundle`; it means nothing for ONNX.

    Returns
    -------
    float
        Largest error that the check found [logits].
    """
    if (kind := release.plan().task.kind) in OF_KSPACE:
        raise _undescribed(f'kind = "{kind}"')
    if target.suffix.lower() == ONNX_SUFFIX:
        return export_onnx(release, target)
    return export_monai_bundle(release, target, with_pickle=with_pickle)


def export_onnx(release: Release, file: Path) -> float:
    """Write a release as one ONNX file with free batch size and image size.

    Sides must be multiples of the network's total stride, as for our own network. What the plan says of the input stands
    in the file's metadata. Instance normalisation is written as :class:`CarefulInstanceNorm`.

    Returns
    -------
    float
        Largest error that the check found [logits].

    Raises
    ------
    FederadError
        M215 damaged release, S204 the file is there or cannot be written, S205 another output, S206 packages missing.
    """
    _needs("onnx", "onnxscript")
    runtime = _needs("onnxruntime")
    network, plan = release.network(), as_seen(release.plan())
    with _new(file) as part:
        with _quiet():
            program = torch.onnx.export(
                _careful(network),
                (torch.zeros(_example_shape(plan)),),
                dynamo=True,
                dynamic_shapes=(_free_axes(plan),),
                input_names=["image"],
                output_names=["logits"],
                verbose=False,
            )
        if program is None:
            raise TypeError("torch gave no ONNX program")
        program.model.metadata_props.update(_onnx_metadata(release, plan))
        program.save(part, external_data=False)
        session = runtime.InferenceSession(part.read_bytes(), providers=["CPUExecutionProvider"])
        return check(network, plan, lambda image: session.run(["logits"], {"image": image})[0], "ONNX")


def export_monai_bundle(release: Release, folder: Path, *, with_pickle: bool = False) -> float:
    """Write a release as a MONAI bundle: network, weights, and the preparation and prediction of the plan.

    Parameters
    ----------
    with_pickle
        Also write ``models/model.pt``, without which ``monai.bundle.load`` finds no weights; ``monai.bundle run`` and
        ``ConfigWorkflow`` do without. Such a bundle is for the machine that wrote it, not for anybody else.

    Returns
    -------
    float
        Largest error that the check found [logits].

    Raises
    ------
    FederadError
        M215 damaged release, P104 no bundle is described for this kind of task or network, S204 the folder is there or
        cannot be written, S205 another output.
    """
    network, plan, card = release.network(), release.plan(), release.card()
    with _new(folder) as part:
        for name in ("configs", "models", "docs"):
            (part / name).mkdir(parents=True)
        _write_json(part / "configs" / "metadata.json", metadata(plan, card))
        _write_json(part / "configs" / "inference.json", inference(plan))
        (part / "models" / MODEL).write_bytes(release.read(MODEL))
        if with_pickle:
            torch.save(
                {name: p.detach().clone() for name, p in network.named_parameters()}, part / "models" / "model.pt"
            )
        (part / "docs" / MANIFEST).write_bytes(release.signed.encode())
        (part / "docs" / CARD).write_bytes(release.read(CARD))
        readme = release.read(CARD_PAGE).decode() + _bundle_page(plan, with_pickle=with_pickle)
        (part / "docs" / "README.md").write_text(readme, encoding="utf-8")
        worst = check(network, plan, _runner(_from_workflow(part)), "MONAI bundle")
        if with_pickle:
            worst = max(worst, check(network, plan, _runner(_from_state_dict(part)), "MONAI bundle's model.pt"))
        return worst


class CarefulInstanceNorm(nn.Module):
    """Instance normalisation in plain operations, for ONNX Runtime.

    Its own operator adds all voxels up one after the other in float32. On an image that is mostly black, as a head in a
    volume is, channels are nearly constant and the error of the mean is divided by a tiny standard deviation: a 3-D U-Net
    at 96 x 96 x 96 came out wrong by 0.006, and by 0.6 where the whole window was black. Means taken axis by axis, and the
    mean of what is left taken off again (Chan et al. 1983, doi:10.1080/00031305.1983.10483115), are as good as torch's.
    """

    def __init__(self, norm: nn.InstanceNorm2d | nn.InstanceNorm3d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, image: Tensor) -> Tensor:
        """``(batch, channel, [z,] y, x)`` with mean 0 and variance 1 over each channel's voxels, scaled and shifted."""
        centred = image - _mean(image)
        centred = centred - _mean(centred)
        normalised = centred * torch.rsqrt(_mean(centred * centred) + self.norm.eps)
        if not self.norm.affine:
            return normalised
        each = (1, -1, *(1 for _ in image.shape[2:]))
        return normalised * self.norm.weight.reshape(each) + self.norm.bias.reshape(each)


def _mean(image: Tensor) -> Tensor:
    """Mean over the spatial axes, one after the other, so that few numbers are added up at a time."""
    for axis in reversed(range(2, image.ndim)):
        image = image.mean(axis, keepdim=True)
    return image


def _careful(network: nn.Module) -> nn.Module:
    """A copy with :class:`CarefulInstanceNorm` in place of torch's."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.InstanceNorm2d | nn.InstanceNorm3d) and not child.track_running_stats:
                setattr(module, name, CarefulInstanceNorm(child))
    return network


def check(network: nn.Module, plan: Plan, exported: Run, what: str) -> float:
    """Largest error of an export over images of several sizes, batches and contents [logits].

    An error is the distance from the network's output in double precision. Our own output in float32 has one, too: below
    1e-5 on most images, above 1e-4 on a black one, where nearly constant channels are divided by almost nothing.

    Raises
    ------
    FederadError
        S205 if an error is above :data:`TOLERANCE` and above twice our own, or an output is not finite.
    """
    exact = copy.deepcopy(network).double()
    worst = 0.0
    for image in _check_images(plan):
        with torch.inference_mode():
            ours = network(torch.from_numpy(image)).numpy()
            truth = exact(torch.from_numpy(image).double()).numpy()
        theirs = exported(image)
        if theirs.shape != ours.shape:
            raise _different(what, f"for an image of {image.shape} it gives {theirs.shape} instead of {ours.shape}")
        if not np.isfinite(ours).all():
            raise _different(what, f"for an image of {image.shape} the released model itself gives no finite output")
        with np.errstate(invalid="ignore"):
            error, our_own = (float(np.abs(output - truth).max()) for output in (theirs, ours))
        if not error <= max(TOLERANCE, 2 * our_own):
            raise _different(
                what, f"for an image of {image.shape} it is wrong by {error:.3g}, our own by {our_own:.3g}"
            )
        worst = max(worst, error)
    return worst


def _check_images(plan: Plan) -> Iterator[NDArray[np.float32]]:
    """The plan's patch, two small images, longer ones, one that is black but for a box, and one that is black."""
    rng = np.random.default_rng(0)
    channels, patch, stride = len(plan.data.channels), plan.data.patch, _stride(plan)
    yield rng.standard_normal((1, channels, *patch), np.float32)
    yield 3.0 * rng.standard_normal((2, channels, *(2 * stride for _ in patch)), np.float32)
    longer = [stride * (i + 2) for i, _ in enumerate(patch)]
    yield rng.standard_normal((3, channels, *longer), np.float32)
    box = np.zeros((1, channels, *(side + stride for side in patch)), np.float32)
    box[(slice(None), slice(None), *(slice(side // 4, side // 2) for side in patch))] = 1.0
    yield box
    yield np.zeros((1, channels, *patch), np.float32)


def _stride(plan: Plan) -> int:
    """Of what every side of an image must be a multiple."""
    return int(2 ** (len(plan.task.channels) - 1))


def _example_shape(plan: Plan) -> tuple[int, ...]:
    """Shape of the image that is traced: no side is as short as the network's stride, which would fix it for ever."""
    stride = _stride(plan)
    return (2, len(plan.data.channels), *(max(side, 2 * stride) for side in plan.data.patch))


def _free_axes(plan: Plan) -> dict[int, Any]:
    """Which axes of the image are free, and within which bounds."""
    dim, stride, axes = torch.export.Dim, _stride(plan), "zyx"[-plan.data.dimensions :]
    sides = {i: stride * dim(f"n_{axis}", min=1, max=MAX_SIDE // stride) for i, axis in enumerate(axes, start=2)}
    return {0: dim("batch", min=1, max=MAX_BATCH), **sides}


def _onnx_metadata(release: Release, plan: Plan) -> dict[str, str]:
    return {
        "federad.release": release.sha256,
        "federad.consortium": release.signed.consortium,
        "federad.run": release.run,
        "federad.plan": plan.canonical_json(),
        "federad.labels": json.dumps(plan.task.labels),
        "federad.input": _input_in_words(plan),
        "federad.output": _output_in_words(plan),
    }


def _output_in_words(plan: Plan) -> str:
    if plan.task.kind not in OF_WHOLE_STUDIES:
        noise = "; the last channel is no label, but the logarithm of their variance"
        learned = noise if plan.n_outputs > len(plan.task.labels) else ""
        return f"logits; the label of a voxel is the index of the largest{learned}"
    if plan.task.kind in WITH_NUMBERS:
        return f"maps of {' and of '.join(plan.task.labels)}; the {plan.task.target} is {Quantification(plan).formula}"
    sharpness = plan.task.sharpness or SHARPNESS
    pooling = f"log(mean(exp({sharpness:g} * map))) / {sharpness:g} over space"
    each = "; a label's probability is the sigmoid of its logit" if plan.task.target == "multi-label" else ""
    return f"class maps; a label's logit is {pooling}, and the map shows where evidence for it lies{each}"


def _input_in_words(plan: Plan) -> str:
    data, axes = plan.data, "(batch, channel, y, x)" if plan.data.dimensions == 2 else "(batch, channel, z, y, x)"
    grid = f" resampled to {' x '.join(f'{mm:g}' for mm in data.spacing_mm)} mm" if data.spacing_mm else ""
    turned = "" if data.modality != "MR" else ", x growing to the patient's left, y to the back, z to the head"
    return (
        f"{data.modality} {axes}{turned}{grid}; channels {', '.join(data.channels)}; each normalised to mean 0 and "
        f"standard deviation 1 over its values that are not 0, and 0 stays 0; sides are multiples of {_stride(plan)}"
    )


# MONAI bundle -------------------------------------------------------------------------------------------------------


def inference(plan: Plan) -> dict[str, Any]:
    """The bundle's ``inference.json``: what ``client.data.preprocessing`` and the task do, in MONAI's words.

    MONAI's axes are ``(channel, x, y, z)`` and the network's ``(channel, z, y, x)``, hence the two transpositions.
    """
    if plan.task.kind not in _DESCRIBED_TASKS:
        raise _undescribed(f'kind = "{plan.task.kind}"')
    return {
        "imports": [
            "$import glob",
            "$import numpy",
            "$import os",
            "$import torch",
            "$from safetensors.torch import load_file",
        ],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/input'",
        "output_dir": "$@bundle_root + '/output'",
        "pattern": "*",
        "found": "$sorted(glob.glob(os.path.join(@dataset_dir, @pattern)))",
        "datalist": _images(plan),
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": network_definition(plan),
        "weights": _weights(plan),
        "network": "$(@network_def.load_state_dict(@weights), @network_def.to(@device).eval())[1]",
        "preprocessing": {"_target_": "Compose", "transforms": _preparation(plan)},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': i} for i in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "inferer": _inferer(plan),
        "postprocessing": {"_target_": "Compose", "transforms": _finish(plan)},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        "run": ["$@evaluator.run()"],
    }


def _weights(plan: Plan) -> str:
    """The signed weights in a bundle's words, without a discriminator that the network was trained against."""
    file = f"load_file(@bundle_root + '/models/{MODEL}')"
    if not plan.has_discriminator:
        return f"${file}"
    return f"${{k.removeprefix('network.'): v for k, v in {file}.items() if k.startswith('network.')}}"


def network_definition(plan: Plan) -> dict[str, Any]:
    """The plan's network in a bundle's words; P104 if nobody has described it here.

    It says again what ``shared_models.networks`` builds; the check of the export finds out if the two part ways.
    """
    if plan.task.views is not None:
        raise _undescribed(f'views = "{plan.task.views}"')
    if plan.n_outputs > len(plan.task.labels):
        raise _undescribed(f'loss = "{plan.training.loss}"')
    if plan.task.network not in _DEFINITIONS:
        raise _undescribed(f'network = "{plan.task.network}"')
    return _DEFINITIONS[plan.task.network](plan)


def _unet(plan: Plan) -> dict[str, Any]:
    return {
        "_target_": "UNet",
        "spatial_dims": plan.data.dimensions,
        "in_channels": len(plan.data.channels),
        "out_channels": len(plan.task.labels),
        "channels": list(plan.task.channels),
        "strides": [2] * (len(plan.task.channels) - 1),
        "num_res_units": plan.task.residual_units,
        "norm": ["INSTANCE", {"affine": True}],
    }


_DEFINITIONS: Mapping[str, Callable[[Plan], dict[str, Any]]] = {"unet": _unet}

_DESCRIBED_TASKS = ("segmentation",)
"""Kinds of task whose prediction :func:`inference` says in MONAI's words."""


def _images(plan: Plan) -> str:
    """What one image is: a file or a DICOM folder; of several sequences, a folder with one file for each."""
    if not _has_patient_axes(plan) or len(plan.data.channels) == 1:
        return "$@found"
    files = [f"{channel}.nii.gz" for channel in plan.data.channels]
    return f"$[[os.path.join(folder, name) for name in {files!r}] for folder in @found]"


def _preparation(plan: Plan) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
    ]
    if _has_patient_axes(plan):
        steps += [{"_target_": "Orientationd", "keys": "image", "axcodes": "LPS", "labels": None}]
        if plan.data.spacing_mm:
            steps += [
                {
                    "_target_": "Spacingd",
                    "keys": "image",
                    "pixdim": [*reversed(plan.data.spacing_mm), -1.0][:3],
                    "mode": "bilinear",
                    "padding_mode": "border",
                }
            ]
    return [
        *steps,
        {"_target_": "Transposed", "keys": "image", "indices": _turned(plan)},
        {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True},
    ]


def _inferer(plan: Plan) -> dict[str, Any]:
    slices = _has_patient_axes(plan) and plan.data.dimensions == 2
    return {
        "_target_": "SliceInferer" if slices else "SlidingWindowInferer",
        "roi_size": list(plan.data.patch),
        "sw_batch_size": WINDOWS_AT_ONCE,
        "overlap": OVERLAP,
        **({"spatial_dim": 0} if slices else {}),
    }


def _finish(plan: Plan) -> list[dict[str, Any]]:
    back = (
        {
            "_target_": "Invertd",
            "keys": "pred",
            "transform": "@preprocessing",
            "orig_keys": "image",
            "nearest_interp": True,
        }
        if _has_patient_axes(plan)
        else {"_target_": "Transposed", "keys": "pred", "indices": _turned(plan)}
    )
    save = {
        "_target_": "SaveImaged",
        "keys": "pred",
        "output_dir": "@output_dir",
        "data_root_dir": "@dataset_dir",
        "output_postfix": "labels",
        "output_dtype": "$numpy.uint8",
        "output_ext": ".nii.gz" if _has_patient_axes(plan) else ".png",
        "resample": False,
    }
    return [{"_target_": "AsDiscreted", "keys": "pred", "argmax": True}, back, save]


def _has_patient_axes(plan: Plan) -> bool:
    """Whether images lie in a patient; photographs do not."""
    return plan.data.modality != "OP"


def _turned(plan: Plan) -> list[int]:
    return [0, 3, 2, 1] if _has_patient_axes(plan) else [0, 2, 1]


def metadata(plan: Plan, card: Card) -> dict[str, Any]:
    """The bundle's ``metadata.json``."""
    labels = {str(i): label for i, label in enumerate(plan.task.labels)}
    tensor = {
        "type": "image",
        "modality": plan.data.modality,
        "spatial_shape": list(plan.data.patch),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
    }
    channels = {str(i): channel for i, channel in enumerate(plan.data.channels)}
    return {
        "version": card.versions["federad"],
        "changelog": {card.versions["federad"]: f"release {card.model_sha256} of run {card.run}"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"safetensors": version("safetensors"), **NEEDED_TO_RUN},
        "name": card.name,
        "task": card.intended_use,
        "description": f"Trained across {len(card.sites)} hospitals by {card.consortium} with federad; release "
        f"{card.model_sha256}, plan {card.plan_sha256}.",
        "authors": card.consortium,
        "copyright": f"see the agreement of {card.consortium}",
        "data_source": "hospitals of the consortium; their data stayed there",
        "data_type": "dicom",
        "image_classes": _input_in_words(plan),
        "label_classes": ", ".join(f"{i} {label}" for i, label in labels.items()),
        "pred_classes": f"{len(labels)} channels of logits, one for each label",
        "eval_metrics": card.test or {},
        **({"eval_noise_intervals": card.test_interval} if card.test_interval else {}),
        "intended_use": card.intended_use,
        "limits": list(card.limits),
        "references": ["https://arxiv.org/abs/1505.04597", "https://arxiv.org/abs/1606.06650"],
        "network_data_format": {
            "inputs": {
                "image": {**tensor, "format": "magnitude", "num_channels": len(channels), "channel_def": channels}
            },
            "outputs": {"pred": {**tensor, "format": "labels", "num_channels": len(labels), "channel_def": labels}},
        },
    }


def _bundle_page(plan: Plan, *, with_pickle: bool) -> str:
    """How to use the bundle, below the model card."""
    pickled = (
        "`models/model.pt` holds the same weights as a pickle, for `monai.bundle.load` on the machine that wrote it. It is "
        "not signed, and a pickle can run code in whoever opens it: delete it before you pass the bundle on, and do not "
        "open one that came to you.\n\n"
        if with_pickle
        else ""
    )
    several = (
        " Each is a folder with the files "
        + ", ".join(f"`{channel}.nii.gz`" for channel in plan.data.channels)
        + " on one grid."
        if _images(plan) != "$@found"
        else ""
    )
    return (
        "\n## Use with MONAI\n\n"
        f"`models/{MODEL}` is the signed file itself: its SHA-256 stands above and in `docs/{MANIFEST}`.\n\n"
        f"{pickled}"
        "MONAI runs what a bundle's configuration says, so use a bundle only if you trust whoever gave it to you.\n\n"
        f"Put images into `input/`; label maps appear in `output/`.{several}\n\n"
        "```\npython -m monai.bundle run --config_file configs/inference.json --bundle_root .\n```\n"
    )


def _from_workflow(bundle: Path) -> nn.Module:
    """The network as ``monai.bundle run`` makes it, from the signed weights."""
    from monai.bundle import ConfigWorkflow

    with _quiet():
        workflow = ConfigWorkflow(
            config_file=str(bundle / "configs" / "inference.json"),
            meta_file=str(bundle / "configs" / "metadata.json"),
            logging_file=False,
            workflow_type="inference",
            bundle_root=str(bundle),
            device="cpu",
        )
        network: nn.Module = workflow.parser.get_parsed_content("network")
    return network


def _from_state_dict(bundle: Path) -> nn.Module:
    """The network as ``monai.bundle.load`` makes it, from the ``model.pt`` that was written a moment ago."""
    from monai.bundle import load

    with _quiet():
        network: nn.Module = load(bundle.name, bundle_dir=bundle.parent, workflow_type="inference", device="cpu")
    return network.eval()


def _runner(network: nn.Module) -> Run:
    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            output: Tensor = network(torch.from_numpy(image))
        return np.asarray(output.numpy(), np.float32)

    return run


# Files and messages -------------------------------------------------------------------------------------------------


@contextmanager
def _new(target: Path) -> Iterator[Path]:
    """Where to write what shall become ``target``: it gets that name if all goes well, and nothing stays if not."""
    if target.exists() or target.is_symlink():
        raise _not_written(target, "it is there already")
    part = target.with_name(f".{target.name}.{uuid4().hex[:8]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.rename(target)
    except OSError as error:
        raise _not_written(target, error.strerror or type(error).__name__) from None
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        elif part.exists():
            part.unlink()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and MONAI say about themselves; the check says what matters."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.onnx", "monai.bundle.workflows", "monai.bundle.scripts", "monai.networks.utils")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _needs(*names: str) -> ModuleType:
    """The last of these packages; S206 if one is not installed."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # from 1.29 on, onnxruntime reports to its maker unless told not to
    for name in names:
        try:
            module = importlib.import_module(name)
        except ImportError:
            raise FederadError(
                "S206",
                happened=f"The package {name} is not installed here.",
                because="An ONNX file is made by onnx and onnxscript and checked with onnxruntime, or not made.",
                remedies=(
                    "install what is missing: pip install 'federad[server]'",
                    "or export a MONAI bundle, which needs none of them: give a target that does not end in .onnx",
                ),
            ) from None
    return module


def _different(what: str, how: str) -> FederadError:
    return FederadError(
        "S205",
        happened=f"The {what} does not give the output of the released model: {how}.",
        because=f"An export is handed out only if it agrees within {TOLERANCE:g}. Nothing was written.",
        remedies=(
            "export with the versions in constraints.txt: another torch or onnxruntime may translate a layer wrongly",
            "use the release itself, or the other form of export",
        ),
    )


def _not_written(target: Path, why: str) -> FederadError:
    return FederadError(
        "S204",
        happened=f"The export {target} cannot be written: {why}.",
        because="An export never overwrites anything, and appears whole or not at all.",
        remedies=("name another file or folder with --to", "or remove what is in the way, or make room on the disk"),
    )


def _undescribed(key: str) -> FederadError:
    return FederadError(
        "P104",
        happened=f"This version cannot write an export of this kind of a plan with {key}.",
        because="An export says in others' words how to prepare an image and read the output; a guess would mislead.",
        remedies=(
            "export to ONNX instead: --to NAME.onnx (not for reconstruction, whose k-space is complex)",
            "or use the release itself",
        ),
    )
