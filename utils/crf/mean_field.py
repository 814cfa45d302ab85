"""The dense CRF's mean field (Kraehenbuhl & Koltun 2011) in torch, CPU or CUDA: the second backend of `utils.crf`."""
import functools
from collections.abc import Sequence

import numpy as np
import torch

from utils.crf import CRFParams
from utils.crf.permutohedral import Lattice


@torch.no_grad()
def mean_field(images: Sequence[np.ndarray], energies: Sequence[np.ndarray], params: CRFParams,
               device: str = "cpu") -> list[np.ndarray]:
    """Approximate the posterior of dense CRFs (Alg. 1): Potts compatibility, kernels normalised to D^-1/2 K D^-1/2.

    images: (H, W, 3) uint8 RGB, of any sizes.  All are computed at once.
    energies: for each image (P, C, H, W) float32, finite: unary energies -log p of P fields over C classes that share
    the image's lattices; P is the same for all images, C need not be.
    device: name of a torch device.
    Returns a list of (P, C, H, W) float32, summing to 1 over C.
    An iteration filters all classes but the first: the filter is linear and beliefs sum to 1, so the first class's
    message is that of the constant 1, computed once, less the others'. Memory at the peak: about 320 to 520 (growing
    with the lattices' vertices) + 60 P C bytes a pixel.
    """
    sizes = tuple(image.shape[:2] for image in images)
    kernels = [_gaussian(sizes, params.gaussian_sxy, params.gaussian_compat, device),
               bilateral(images, params.bilateral_sxy, params.bilateral_srgb, params.bilateral_compat, device)]
    unary = _joined(energies).to(device)  # (P, C, N)
    constant = sum(kernel.total for kernel in kernels)  # (N,)
    belief = (-unary).softmax(dim=1)
    for _ in range(params.iterations):
        others = belief[:, 1:].flatten(0, 1)  # (P (C - 1), N)
        messages = sum(kernel(others) for kernel in kernels).view_as(belief[:, 1:])
        first = constant - messages.sum(dim=1, keepdim=True)
        belief = torch.cat([first, messages], dim=1).sub_(unary).softmax(dim=1)
    return _separated(belief.cpu(), energies)


class Kernel:
    """A Gaussian kernel K over pixels as weight D^-1/2 K D^-1/2, D its row sums; `total` is its product with 1."""

    def __init__(self, features: torch.Tensor, groups: torch.Tensor | None, weight: float):
        self.lattice, self.weight = Lattice(features, groups), weight
        ones = features.new_ones(1, len(features))
        self.scale = torch.ones_like(ones)
        self.scale = self._product(ones).add_(1e-20).rsqrt_()  # (1, N)
        self.total = self(ones)[0]  # (N,)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Messages of beliefs: (K, N) -> (K, N)."""
        return self._product(values).mul_(self.weight)

    def _product(self, values):
        return self.lattice((values * self.scale).T).T * self.scale


@functools.lru_cache(maxsize=4)
def _gaussian(sizes: tuple[tuple[int, int], ...], sxy: float, weight: float, device: str) -> Kernel:
    # It does not depend on the colours: images of one size, of which a dataset has many, share it.
    return Kernel(_places(sizes, sxy, device), _groups(sizes, device), weight)


def bilateral(images: Sequence[np.ndarray], sxy: float, srgb: float, weight: float, device: str) -> Kernel:
    """The appearance kernel over the pixels of all images, each of which sees those of its own image."""
    sizes = [image.shape[:2] for image in images]
    # Joined in numpy, into a new array: torch warns of arrays that cannot be written to, as those that view PIL images.
    colours = torch.from_numpy(np.concatenate([image.reshape(-1, 3) for image in images])).to(device)
    features = torch.cat([_places(sizes, sxy, device), colours / srgb], dim=1)  # (N, 5)
    return Kernel(features, _groups(sizes, device), weight)


def _places(sizes, sxy, device):
    """(N, 2): x and y of every pixel in standard deviations, raster order, one image after the other."""
    grids = [torch.meshgrid(torch.arange(w, device=device), torch.arange(h, device=device), indexing="xy")
             for h, w in sizes]
    return torch.cat([torch.stack(grid, dim=-1).view(-1, 2) for grid in grids]) / sxy


def _groups(sizes, device):
    if len(sizes) == 1:
        return None
    counts = torch.tensor([height * width for height, width in sizes], device=device)
    return torch.arange(len(sizes), device=device).repeat_interleave(counts)


def _joined(energies):
    """(P, C, N) of all images, C the largest number of classes; a class that an image lacks costs infinity there."""
    planes, most = len(energies[0]), max(energy.shape[1] for energy in energies)
    parts = [torch.from_numpy(energy).flatten(2) for energy in energies]
    return torch.cat([torch.cat([part, part.new_full((planes, most - part.shape[1], part.shape[2]), torch.inf)], dim=1)
                      for part in parts], dim=2)


def _separated(belief, energies):
    """The inverse of `_joined`."""
    pixels = [energy[0, 0].size for energy in energies]
    return [part[:, :energy.shape[1]].reshape(energy.shape).numpy()
            for part, energy in zip(belief.split(pixels, dim=2), energies)]
