"""Networks made ready for inference: batch normalisation folded into the convolution before it, where there is one."""
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# (convolution, the normalisation that takes its output) by their names in one module: torchvision's blocks and stem,
# the residual blocks of ResNet38, whose first normalisation follows a sum and stays, and DeepLab's head.
PAIRS = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1"),
         ("conv_branch2a", "bn_branch2b1"), ("conv_branch2b1", "bn_branch2b2"),
         ("conv_fov", "bn_fov"), ("conv_fov2", "bn_fov2"))


def for_inference(network, device="cpu"):
    """Fold a network in eval mode in place, and move it to a device in the order of memory that convolutions like.

    Its outputs stay the same up to rounding; its weights are no longer those of its record: it is for inference only.
    Raises ValueError in training mode, where normalisation depends on the batch.
    """
    if network.training:
        raise ValueError("folding needs a network in eval mode")
    for module in network.modules():
        children = dict(module.named_children())
        for conv, norm in PAIRS:
            if isinstance(children.get(conv), nn.Conv2d) and isinstance(children.get(norm), nn.BatchNorm2d):
                setattr(module, conv, fuse_conv_bn_eval(children[conv], children[norm]))
                setattr(module, norm, nn.Identity())
    return network.requires_grad_(False).to(device, memory_format=torch.channels_last)
