"""Dense conditional random field on one image (Kraehenbuhl & Koltun 2011). No torch at the top: workers import it."""
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np

from utils.errors import UserError

PROBABILITY_FLOOR = 1e-5  # keeps the unary energy -log p finite: at most 11.5
BACKENDS = ("pydensecrf", "torch")
SUM_TOLERANCE = 1e-2  # maps stored as float16 do not sum to 1 exactly


@dataclass(frozen=True)
class CRFParams:
    """Settings of the dense CRF: `sxy` in pixels, `srgb` in grey levels (0..255), `compat` the Potts weights.

    Raises ValueError for a width that is not above 0, or a negative number of iterations.
    """

    gaussian_sxy: float
    gaussian_compat: float
    bilateral_sxy: float
    bilateral_srgb: float
    bilateral_compat: float
    iterations: int

    def __post_init__(self):
        if min(self.gaussian_sxy, self.bilateral_sxy, self.bilateral_srgb) <= 0:
            raise ValueError(f"a CRF width (sxy, srgb) must be above 0: {self}")
        if self.iterations < 0:
            raise ValueError(f"CRF iterations must be 0 or more: {self}")


class CRF(NamedTuple):
    """How a run computes its dense CRF: the last three arguments of `dense_crf`."""

    params: CRFParams
    backend: str
    device: str


# As in the published code of each method; IRN's are those of its label making (where gt_prob is 0.7).
PRESETS = {
    "psa": CRFParams(3, 3, 80, 13, 10, 10),
    "irn": CRFParams(3, 3, 50, 5, 10, 10),
    "seamv1": CRFParams(3, 3, 32, 13, 10, 1),
    "mctformer": CRFParams(4, 3, 83, 5, 3, 10),
    "avc": CRFParams(3, 7, 60, 3, 8, 3),
}


def dense_crf(image: np.ndarray, probabilities: np.ndarray, params: CRFParams, backend: str = "pydensecrf",
              device: str = "cpu") -> np.ndarray:
    """Refine class probabilities with the image's edges by mean-field inference (Kraehenbuhl & Koltun 2011, Alg. 1).

    image: (H, W, 3) uint8 RGB.
    probabilities: (C, H, W) float, each pixel summing to 1 over C (within 0.01); values below 1e-5 are raised to 1e-5
    before the logarithm, so that the unary energy of a class that the network excludes stays finite.
    Or (P, C, H, W): P fields over the same image, which share its lattices.
    params: CRFParams, for instance one of PRESETS.
    backend: "pydensecrf", or "torch" (`utils.crf.mean_field`), which runs on `device`, the name of a torch device.
    Returns the posterior, float32 in the shape of the probabilities, each pixel summing to 1. With a single class, the
    probabilities come back unchanged.
    Raises ValueError for a wrong shape, dtype, sum or backend, or values not finite; ImportError if pydensecrf is asked
    for and missing.
    """
    _check(image, probabilities)
    if backend not in BACKENDS:
        raise ValueError(f"CRF backend is {backend!r}; give one of {', '.join(BACKENDS)}")
    if probabilities.shape[-3] == 1:
        return probabilities.astype(np.float32)
    energy = -np.log(probabilities.astype(np.float32).clip(PROBABILITY_FLOOR, 1))
    energy = np.ascontiguousarray(energy).reshape(-1, *probabilities.shape[-3:])  # (P, C, H, W)
    if backend == "torch":
        from utils.crf.mean_field import mean_field
        (posterior,) = mean_field([image], [energy], params, device)
    else:
        posterior = _by_pydensecrf(image, energy, params)
    return posterior.reshape(probabilities.shape)


def _by_pydensecrf(image: np.ndarray, energy: np.ndarray, params: CRFParams) -> np.ndarray:
    fields, classes, height, width = energy.shape
    # The bindings ask for a writable buffer, which an array viewing a PIL image is not; they only read it.
    pixels = np.require(image, requirements=["C", "W"])
    crf = _densecrf().DenseCRF2D(width, height, classes)
    crf.addPairwiseGaussian(sxy=params.gaussian_sxy, compat=params.gaussian_compat)
    crf.addPairwiseBilateral(
        sxy=params.bilateral_sxy, srgb=params.bilateral_srgb, rgbim=pixels, compat=params.bilateral_compat
    )
    posterior = np.empty(energy.shape, np.float32)
    for unary, out in zip(energy.reshape(fields, classes, -1), posterior):
        crf.setUnaryEnergy(unary)  # (C, H * W); the lattices are kept
        out[:] = np.asarray(crf.inference(params.iterations)).reshape(out.shape)
    return posterior


def settle_backend(name: str) -> str:
    """Resolve --crf_backend to one of BACKENDS: "auto" is torch.

    On 370 photos of VOC and 300 of Pet both found the same class in 99.99999 % of the pixels, and the scores were equal
    to four digits; torch is twice as fast, needs no compiler and runs on a GPU too (docs/crf.md).
    Raises UserError if pydensecrf is asked for and cannot be imported.
    """
    if name != "pydensecrf":
        return "torch"
    try:
        _densecrf()
    except ImportError as error:
        raise UserError(f"--crf_backend pydensecrf, but {error}") from None
    return name


def _densecrf() -> ModuleType:
    # Imported on use: runs with --no-crf need not have built it.
    try:
        from pydensecrf import densecrf
    except ImportError as error:
        remedy = "run: pip install pydensecrf2, or pass --crf_backend torch"
        raise ImportError(f"pydensecrf cannot be imported; {remedy}") from error
    return densecrf


def _check(image: np.ndarray, probabilities: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} {image.shape}; give uint8 (H, W, 3), RGB")
    if probabilities.ndim not in (3, 4) or probabilities.dtype.kind != "f":
        raise ValueError(f"probabilities are {probabilities.dtype} {probabilities.shape}; give floats (C, H, W)")
    if probabilities.shape[-2:] != image.shape[:2] or probabilities.size == 0:
        raise ValueError(f"probabilities {probabilities.shape} do not fit the image {image.shape}; resize them to it")
    total = probabilities.sum(axis=-3, dtype=np.float32)
    if not np.isfinite(total).all():
        raise ValueError("probabilities have values that are not finite; check the network's scores")
    if probabilities.min() < 0 or abs(total - 1).max() > SUM_TOLERANCE:
        low, high = total.min(), total.max()
        raise ValueError(f"probabilities sum to {low:.3f}..{high:.3f} a pixel, or are negative; normalise them to 1")
