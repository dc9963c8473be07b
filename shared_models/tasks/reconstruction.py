"""Reconstruction: an image from a part of its k-space.

A volume holds the fully sampled coil images; a sample is their k-space with most of it left out, and the mask that says
which. Networks answer with coil images. Everything is divided by the largest value of the zero-filled image, which is
known where nobody has the full k-space.

The plan fixes what the reference is, since the same image scores differently against another one. ``"complex"``: coil
images with their phase; ``"magnitude"``: their root sum of squares, as in fastMRI (Zbontar et al. 2018,
arXiv:1811.08839). The loss is the distance from the target over the target's own length, so that dark slices count as
much as bright ones.

In evaluation a slice has one mask, drawn from the keys of its site and study and its own number: whoever measures it,
measures the same. Peak signal-to-noise ratios, SSIM (Wang et al. 2004, doi:10.1109/TIP.2003.819861) and NMSE are those of
whole studies, with the largest magnitude of the study's reference as range; ``zero_filled_...`` stands beside them for the
image that needs no network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from monai.metrics.regression import KernelType, compute_ssim_and_cs
from numpy.typing import NDArray
from torch import Tensor, nn

from shared_models import networks, stability
from shared_models.mri import (
    fourier,
    inverse_fourier,
    low_resolution_sensitivities,
    root_sum_of_squares,
    sampling_mask,
    to_channels,
    to_complex,
)
from shared_models.plan import Plan
from shared_models.seeds import generator
from shared_models.task import Picture, Sample, Task
from shared_models.volume import Volume, crop

SLICES_AT_ONCE = 4
"""Slices of one volume in one forward pass: speed and memory only."""

HIGHEST_PSNR_DB = 100.0
"""What a flawless reconstruction scores, so that its score is a number."""

SSIM_WINDOW = 7
"""Side of the square over which SSIM compares, as in fastMRI [pixels]."""

DARKEST = 1.0
"""Added to the square of a target's length, so that a window without signal pulls no harder than one bright pixel."""

CARD_ACCELERATIONS = (3.0, 4.0, 6.0, 8.0, 11.0)
"""At which the stability card looks, where the centre leaves room."""

ERROR_GAIN = 5.0
"""How much brighter errors are shown than the image."""

PANELS = ("reference", "zero-filled", "reconstruction", f"error, {ERROR_GAIN:g} times as bright")


class Reconstruction(Task):
    """An image from a part of its k-space; see the module for methods and sources."""

    metrics: Mapping[str, bool] = {
        "psnr": True,
        "gain_db": True,
        "magnitude_psnr": True,
        "ssim": True,
        "nmse": False,
    }
    ranges: Mapping[str, tuple[float, float]] = {
        "psnr": (0.0, 60.0),
        "gain_db": (-10.0, 30.0),
        "magnitude_psnr": (0.0, 60.0),
        "ssim": (0.0, 1.0),
        "nmse": (0.0, 1.0),
    }

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._accelerations = dict(plan.task.site_acceleration or ())

    def build_network(self) -> nn.Module:
        """The network that the plan names."""
        return networks.build(self.plan)

    def draw(self, volume: Volume, rng: np.random.Generator) -> Sample:
        """Measured k-space and mask ``(2 coil + 1, y, x)`` of one slice, and its coil images ``(2 coil, y, x)``.

        The slice is cut to the patch's size: along x, the readout, anywhere, which a scanner could have done as well;
        along y around its centre.
        """
        size = (1, *self.plan.data.patch)
        _, y, x = volume.image.shape[1:]
        corner = (
            int(rng.integers(volume.image.shape[1])),
            (y - size[1]) // 2,
            int(rng.integers(x - size[2] + 1)) if x >= size[2] else (x - size[2]) // 2,
        )
        images = crop(volume.image, corner, size)[:, 0]
        if self.plan.training.flips and rng.random() < 0.5:
            images = images[..., ::-1]
        batch = torch.from_numpy(np.array(images, np.float32))[None]
        sample, scale = self._measured(batch, [self._mask(volume, (size[1], size[2]), rng)])
        return Sample(sample[0].numpy(), (batch / scale)[0].numpy())

    def in_another_light(self, sample: Sample, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Sample:
        """Coil images of another magnitude and the same phase, measured anew under the same mask.

        What is measured and the target change alike, as they would on another scanner; the darkest place, which is air,
        stays dark.
        """
        images = torch.from_numpy(sample.target)[None]
        before = root_sum_of_squares(to_complex(images))[0].numpy()
        after = change(before[None])[0]
        factor = np.divide(after - after.min(), before, out=np.zeros_like(before), where=before > 0)
        changed = images * torch.from_numpy(factor)
        measured, scale = self._measured(changed, [sample.image[-1] > 0])
        return replace(sample, image=measured[0].numpy(), target=(changed / scale)[0].numpy())

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Distance from the target over the target's length; the mean over samples.

        Parameters
        ----------
        output, target
            Coil images, float32 ``(batch, 2 coil, y, x)``. With ``reference = "magnitude"`` their root sums of squares are
            compared, else the images themselves.
        """
        if self.plan.task.reference == "magnitude":
            output, target = (_smooth_magnitude(images) for images in (output, target))
        error, length = (part.square().flatten(1).sum(1) for part in (output - target, target))
        return ((error + 1e-8) / (length + DARKEST)).sqrt().mean()

    def predict(self, network: Callable[[Tensor], Tensor], volume: Volume, device: torch.device) -> NDArray[np.float32]:
        """Coil images of every slice, ``(2 coil, z, y, x)``, in the volume's own units."""
        sample, scale = self._evaluated(volume)
        parts = torch.split(sample.to(device), SLICES_AT_ONCE)
        images = torch.cat([network(part).float().cpu() for part in parts]) * scale
        return np.asarray(images.movedim(0, 1).numpy(), np.float32)

    def zero_filled(self, volume: Volume) -> NDArray[np.float32]:
        """The inverse transform of what is measured, ``(2 coil, z, y, x)``: the image without any method."""
        sample, scale = self._evaluated(volume)
        images = to_channels(inverse_fourier(to_complex(sample[:, :-1]))) * scale
        return np.asarray(images.movedim(0, 1).numpy(), np.float32)

    def classical(self, volume: Volume) -> dict[str, NDArray[np.generic]]:
        """The zero-filled image, and wavelet compressed sensing; both ``(2 coil, z, y, x)``."""
        from shared_models.compressed_sensing import wavelet_reconstruction

        sample, scale = self._evaluated(volume)
        measured, mask = to_complex(sample[:, :-1]), sample[:, -1:]
        sensitivities = low_resolution_sensitivities(measured, self.plan.task.centre_fraction)
        sparse = to_channels(wavelet_reconstruction(measured, mask, sensitivities)) * scale
        return {
            "zero-filled": self.zero_filled(volume),
            "wavelet compressed sensing": np.asarray(sparse.movedim(0, 1).numpy(), np.float32),
        }

    def card(self, network: Callable[[Tensor], Tensor], volume: Volume, device: torch.device) -> dict[str, float]:
        """The stability card (:mod:`shared_models.stability`) of the slice with the most signal.

        ===========================  =====================================================================================
        amplification                the worst change of the image that was found, over the change of the samples [ratio]
        structure                    share of an inserted disc that comes back; ``structure_zero_filled`` beside it
        ``"psnr at 6x"``             PSNR of the coil images at another acceleration [dB]
        ===========================  =====================================================================================

        Of a volume that was not fully sampled, amplification alone.
        """
        z = int((magnitude(volume.image) ** 2).sum(axis=(1, 2)).argmax())
        if volume.measured is not None:
            sample, _ = self._evaluated(volume)
            return {"amplification": stability.amplification(network, sample[z : z + 1].to(device))}
        images = torch.from_numpy(np.array(volume.image[:, z : z + 1], np.float32)).movedim(1, 0)
        shape = (images.shape[2], images.shape[3])
        sample, scale = self._measured(images, [self._mask(volume, shape, generator("card", volume.key))])
        sample, images = sample.to(device), (images / scale).to(device)
        kept = stability.structure(network, images, sample[:, -1:])
        numbers = {
            "amplification": stability.amplification(network, sample),
            "structure": kept.network,
            "structure_zero_filled": kept.zero_filled,
        }
        task = self.plan.task
        brightest = float(root_sum_of_squares(to_complex(images)).max())
        for acceleration in CARD_ACCELERATIONS:
            if task.centre_fraction < 1 / acceleration:
                rng = generator("card", volume.key, acceleration)
                mask = sampling_mask(task.mask, shape, acceleration, task.centre_fraction, rng)
                other, rescaled = self._measured(images.cpu(), [mask])
                with torch.no_grad():
                    answer = network(other.to(device)).cpu() * rescaled
                error = float((answer - images.cpu()).square().sum(dim=1).mean())
                numbers[f"psnr at {acceleration:g}x"] = psnr_db(error, brightest)
        return numbers

    def measure(self, prediction: NDArray[np.generic], volume: Volume) -> dict[str, float]:
        """Numbers about one study, against its fully sampled coil images.

        =====================  ===========================================================================================
        psnr                   peak signal-to-noise ratio against the plan's reference [dB]
        gain_db                psnr - zero_filled_psnr [dB]
        magnitude_psnr         that of the magnitude [dB]; the same as psnr where that is the reference
        ssim                   structural similarity of magnitudes, the mean over slices
        nmse                   squared error of the magnitude over its square
        zero_filled_...        the same of the zero-filled image
        =====================  ===========================================================================================
        """
        reference = np.asarray(volume.image)
        own, none = (self._scores(images, reference) for images in (np.asarray(prediction), self.zero_filled(volume)))
        return {
            "psnr": own["psnr"],
            "gain_db": own["psnr"] - none["psnr"],
            "magnitude_psnr": own["magnitude_psnr"],
            "ssim": own["ssim"],
            "nmse": own["nmse"],
            "zero_filled_psnr": none["psnr"],
            "zero_filled_ssim": none["ssim"],
        }

    def picture(
        self,
        prediction: NDArray[np.generic],
        volume: Volume,
        doubts: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> Picture:
        """Reference, zero-filled image, reconstruction and error of the slice with the most signal, side by side."""
        reference, zero_filled, reconstruction = (
            magnitude(images) for images in (volume.image, self.zero_filled(volume), np.asarray(prediction, np.float32))
        )
        z = int((reference**2).sum(axis=(1, 2)).argmax())
        error = ERROR_GAIN * np.abs(reconstruction[z] - reference[z])
        brightest = max(float(np.percentile(reference[z], 99.5)), 1e-12)
        planes = np.concatenate([reference[z], zero_filled[z], reconstruction[z], error], axis=1) / brightest
        nothing = np.zeros(planes.shape, np.uint8)
        return Picture(
            image=np.asarray(planes.clip(0, 1), np.float32),
            truth=nothing,
            prediction=nothing,
            pixel_mm=volume.spacing_mm[1:],
            panels=PANELS,
        )

    def _scores(self, images: NDArray[np.generic], reference: NDArray[np.float32]) -> dict[str, float]:
        """PSNR against the reference and of the magnitude, SSIM and NMSE; coil images ``(2 coil, z, y, x)``."""
        ours, truth = magnitude(images), magnitude(reference)
        brightest = float(truth.max())
        square_error = float(((ours - truth) ** 2).mean())
        of_magnitude = psnr_db(square_error, brightest)
        if self.plan.task.reference == "magnitude":
            of_target = of_magnitude
        else:
            difference = np.asarray(images, np.float64) - reference
            of_target = psnr_db(float((difference**2).sum(axis=0).mean()), brightest)
        return {
            "psnr": of_target,
            "magnitude_psnr": of_magnitude,
            "ssim": ssim(ours, truth, brightest),
            "nmse": square_error / max(float((truth**2).mean()), 1e-30),
        }

    def _evaluated(self, volume: Volume) -> tuple[Tensor, Tensor]:
        """What was measured of every slice, as networks take it, ``(z, 2 coil + 1, y, x)``, and each slice's scale."""
        masks = [self.mask(volume, z) for z in range(volume.image.shape[1])]
        return self._measured(torch.from_numpy(np.array(volume.image, np.float32)).movedim(1, 0), masks)

    def mask(self, volume: Volume, z: int) -> NDArray[np.bool_]:
        """The samples of slice ``z`` that the network is given, ``(y, x)``: those that were measured, or the plan's."""
        if volume.measured is not None:
            return np.asarray(volume.measured[z])
        shape = (volume.image.shape[2], volume.image.shape[3])
        return self._mask(volume, shape, generator("mask", volume.site, volume.key, z))

    def _mask(self, volume: Volume, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.bool_]:
        task = self.plan.task
        acceleration = self._accelerations.get(volume.site, task.acceleration)
        return sampling_mask(task.mask, shape, acceleration, task.centre_fraction, rng)

    @staticmethod
    def _measured(images: Tensor, masks: list[NDArray[np.bool_]]) -> tuple[Tensor, Tensor]:
        """Coil images ``(batch, 2 coil, y, x)`` as k-space and mask ``(batch, 2 coil + 1, y, x)``, and what they were
        divided by, ``(batch, 1, 1, 1)``."""
        mask = torch.from_numpy(np.stack(masks)).float()[:, None]
        kspace = fourier(to_complex(images)) * mask
        brightest = root_sum_of_squares(inverse_fourier(kspace)).amax(dim=(1, 2))
        scale = torch.where(brightest > 0, brightest, 1.0)[:, None, None, None]
        return torch.cat([to_channels(kspace / scale), mask], dim=1), scale


def magnitude(images: NDArray[np.generic]) -> NDArray[np.float64]:
    """Root sum of squares of coil images ``(2 coil, z, y, x)``, ``(z, y, x)``."""
    values: NDArray[np.float64] = np.sqrt((np.asarray(images, np.float64) ** 2).sum(axis=0))
    return values


def psnr_db(square_error: float, brightest: float) -> float:
    """Peak signal-to-noise ratio [dB] of a mean square error, at most 100 and at least 0."""
    if brightest <= 0:
        return 0.0
    ratio = brightest**2 / max(square_error, brightest**2 * 10 ** (-HIGHEST_PSNR_DB / 10))
    return max(0.0, 10 * math.log10(ratio))


def ssim(image: NDArray[np.float64], reference: NDArray[np.float64], brightest: float) -> float:
    """Mean structural similarity of the slices of two magnitudes ``(z, y, x)``, over squares of 7 pixels."""
    ours, truth = (torch.from_numpy(one / max(brightest, 1e-30))[:, None] for one in (image, reference))
    window = min(SSIM_WINDOW, *image.shape[1:])
    values, _ = compute_ssim_and_cs(
        ours, truth, spatial_dims=2, data_range=1.0, kernel_type=KernelType.UNIFORM, kernel_size=(window, window),
        kernel_sigma=(1.0, 1.0),
    )  # fmt: skip
    return float(values.mean())


def _smooth_magnitude(images: Tensor) -> Tensor:
    """Root sum of squares over channels ``(batch, y, x)``, with a slope at zero."""
    return (images.square().sum(dim=1) + 1e-12).sqrt()
