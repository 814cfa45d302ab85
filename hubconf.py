"""Entry points for torch.hub: `torch.hub.load(folder, "wsss", path, source="local")`, folder: of this repository."""
dependencies = ["torch", "torchvision", "numpy", "PIL"]


def wsss(path: str, device: str = "auto", **options: object):
    """A pipeline from photos to masks in memory, from a checkpoint of stage 1 or 2: see `src.pipeline.Pipeline`.

    options: those of `Pipeline.load`.
    """
    from src.pipeline import Pipeline
    return Pipeline.load(path, device, **options)


def deeplab(path: str, device: str = "auto", **options: object):
    """As `wsss`, from a checkpoint of step 5: see `src.pipeline.DeepLabPipeline`."""
    from src.pipeline import DeepLabPipeline
    return DeepLabPipeline.load(path, device, **options)
