"""A linear multi-label head on stored features of whole images: logistic regression, in seconds."""
import torch
from torch.nn import functional as F

PENALTY = 0.01  # of the squared weights, of standardised features
STEPS = 100     # of L-BFGS, at most
ROWS = 16_384   # images at once


def fit_head(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (K, D) and biases (K,) of logits of the features.

    features: (N, D) float32, pooled over each image; overwritten, as those of COCO fill half a gigabyte.
    labels: (N, K) in {0, 1}.
    Features are standardised for the fit, so that the penalty means the same for every backbone; what is returned takes
    them as they were.
    """
    mean, deviation = features.mean(dim=0), features.std(dim=0, unbiased=False) + 1e-6
    inputs, (count, classes) = features.sub_(mean).div_(deviation), labels.shape
    weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = PENALTY * weight.square().sum()
        loss.backward()
        for x, y in zip(inputs.split(ROWS), labels.split(ROWS)):
            # Summed over classes: each is a regression of its own, whatever their number.
            part = F.binary_cross_entropy_with_logits(x @ weight.T + bias, y.float()) * (classes * len(x) / count)
            part.backward()
            loss = loss.detach() + part.detach()
        return loss
    with torch.enable_grad():
        optimiser.step(closure)
    weight, bias = weight.detach() / deviation, bias.detach()
    return weight, bias - weight @ mean
