"""Write random weights to a file.

    python tests/random_weights.py PATH LAYOUT '{"kind": "classifier", "backbone": "resnet38", ...}' [SEED]

LAYOUT: a family of published files (psa, mctformer), "backbone" (that of such a network alone), or "torchvision", whose
network has a name only.  Chains of script runs make their files with this: the weights then depend on the seed alone,
and the random numbers of the tests' process do not depend on which chain was made before.
"""
import json
import sys
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.weights import Weights, build_network, export, pack
from utils.checkpoint import save_tensors


def state(layout: str, how: dict) -> dict[str, torch.Tensor]:
    """The state dict of a network of random weights in a layout.  how: of `build_network`, or torchvision's name."""
    if layout == "torchvision":
        # Residuals that start at 0: frozen normalisation does not divide by what random weights make grow.
        return torchvision.models.get_model(how["name"], weights=None, zero_init_residual=True).state_dict()
    network = build_network(**how)
    if layout == "backbone":
        return network.backbone.state_dict()
    return export(Weights("", "", {how["kind"]: pack(network, **how)}), layout)[0]


if __name__ == "__main__":
    path, layout, how, *seed = sys.argv[1:]
    torch.manual_seed(int(*seed))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, state(layout, json.loads(how)))
