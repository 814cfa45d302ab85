"""SGD as all stages use it: parameter groups, the polynomial schedule, clipping."""
import torch

from utils.config import TrainConfig

POLY_POWER = 0.9


def build_optimiser(network: torch.nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD with momentum over `parameter_groups`."""
    return torch.optim.SGD(parameter_groups(network, config), lr=config.lr, momentum=config.momentum)


def parameter_groups(network: torch.nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    """Every parameter that learns, in exactly one of four groups: backbone or head, decayed weights or the rest.

    Heads learn `head_lr` times as fast; biases and normalisation are not decayed.
    """
    groups = []
    for is_head in (False, True):
        for decayed in (True, False):
            chosen = [p for name, p in network.named_parameters() if p.requires_grad
                      and name.startswith("backbone.") != is_head and (p.ndim > 1) == decayed]
            lr = config.lr * (config.head_lr if is_head else 1)
            groups.append({"params": chosen, "lr": lr, "initial_lr": lr,
                           "weight_decay": config.weight_decay if decayed else 0.0})
    return [group for group in groups if group["params"]]


def set_rates(optimiser: torch.optim.Optimizer, progress: float) -> None:
    """Let each group's rate fall as (1 - progress)^0.9.  progress: of the training, in [0, 1)."""
    for group in optimiser.param_groups:
        group["lr"] = group["initial_lr"] * (1 - progress) ** POLY_POWER


def clip_gradient(optimiser: torch.optim.Optimizer, limit: float) -> float:
    """Scale the whole gradient down to the norm `limit` if it is longer (0: never); returns its norm before."""
    parameters = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if limit:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm.item()
