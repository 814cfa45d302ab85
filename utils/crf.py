"""Dense conditional random field on one image (Kraehenbuhl & Koltun 2011). No torch: worker processes import it."""

from dataclasses import dataclass

import numpy as np

PROBABILITY_FLOOR = 1e-5  # keeps the unary energy -log p finite: at most 11.5
SUM_TOLERANCE = 1e-2  # maps kept as float16 do not sum to 1 exactly


@dataclass(frozen=True)
class CRFParams:
    """Settings of the dense CRF: `sxy` in pixels, `srgb` in grey levels (0..255), `compat` the Potts weights."""

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


# As in the published code of each system; the IRN values are those it makes its labels with (there gt_prob is 0.7).
PRESETS = {
    "psa": CRFParams(3, 3, 80, 13, 10, 10),
    "irn": CRFParams(3, 3, 50, 5, 10, 10),
    "seamv1": CRFParams(3, 3, 32, 13, 10, 1),
    "mctformer": CRFParams(4, 3, 83, 5, 3, 10),
    "avc": CRFParams(3, 7, 60, 3, 8, 3),
}


def dense_crf(image, probabilities, params):
    """Refine class probabilities with the image's edges by mean-field inference (Kraehenbuhl & Koltun 2011, Alg. 1).

    image: (H, W, 3) uint8 RGB.
    probabilities: (C, H, W) float, each pixel summing to 1 over C (within 0.01); values below 1e-5 are raised to 1e-5
    before the logarithm, so that a class ruled out by the network can come back where the image insists.
    params: CRFParams, for instance one of PRESETS.
    Returns the posterior, (C, H, W) float32, each pixel summing to 1. One class alone has nothing to be weighed against
    and comes back as it is.
    Raises ValueError for a wrong shape, dtype or sum, or values not finite; ImportError if pydensecrf is missing.
    """
    _check(image, probabilities)
    classes, height, width = probabilities.shape
    if classes == 1:
        return probabilities.astype(np.float32)
    energy = -np.log(probabilities.astype(np.float32).clip(PROBABILITY_FLOOR, 1))
    field = _densecrf().DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(np.ascontiguousarray(energy).reshape(classes, -1))  # (C, H * W)
    field.addPairwiseGaussian(sxy=params.gaussian_sxy, compat=params.gaussian_compat)
    # The binding asks for a writable buffer, which an array viewing a PIL image is not; it only reads it.
    pixels = np.require(image, requirements=["C", "W"])
    field.addPairwiseBilateral(
        sxy=params.bilateral_sxy, srgb=params.bilateral_srgb, rgbim=pixels, compat=params.bilateral_compat
    )
    return np.array(field.inference(params.iterations), dtype=np.float32).reshape(classes, height, width)


def _densecrf():
    # Imported on use: runs with --no-crf need not have built it.
    try:
        from pydensecrf import densecrf
    except ImportError as error:
        raise ImportError("the dense CRF needs pydensecrf; run: pip install pydensecrf2 (or pass --no-crf)") from error
    return densecrf


def _check(image, probabilities):
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} {image.shape}; give uint8 (H, W, 3), RGB")
    if probabilities.ndim != 3 or probabilities.dtype.kind != "f":
        raise ValueError(f"probabilities are {probabilities.dtype} {probabilities.shape}; give floats (C, H, W)")
    if probabilities.shape[1:] != image.shape[:2] or probabilities.size == 0:
        raise ValueError(f"probabilities {probabilities.shape} do not fit the image {image.shape}; resize them to it")
    total = probabilities.sum(axis=0, dtype=np.float32)
    if not np.isfinite(total).all():
        raise ValueError("probabilities have values that are not finite; check the network's scores")
    if probabilities.min() < 0 or abs(total - 1).max() > SUM_TOLERANCE:
        low, high = total.min(), total.max()
        raise ValueError(f"probabilities sum to {low:.3f}..{high:.3f} a pixel, or are negative; normalise them to 1")
