"""What a program that runs an exported file must know: the JSON beside it."""
from models.export import OPSET, ClassifierGraph, DeepLabGraph, Graph
from models.weights import class_names
from utils.datasets import DATASETS
from utils.grids import Size
from utils.options import FLAGS
from utils.recipes import step_defaults


def usage(graph: Graph, payload: dict, record: dict, size: Size | None) -> dict[str, object]:
    """Inputs, outputs, pre- and post-processing of an exported graph, as plain values.

    payload: the checkpoint.  record: of its network.  size: (H, W) of the images, None for any.
    """
    backbone = graph.network.backbone
    classes = class_names(payload)
    return {
        "network": record["kind"], "backbone": record["backbone"], "opset": OPSET, "classes": list(classes),
        "inputs": _inputs(graph, size, len(classes)), "outputs": _outputs(graph, len(classes)),
        "preprocessing": {
            "colours": "RGB, EXIF orientation applied", "layout": "NCHW float32",
            "normalise": "(value / 255 - mean) / std", "mean": list(backbone.normalise.mean),
            "std": list(backbone.normalise.std), "stride": backbone.stride,
            "max_size": payload["options"].get("max_size") or FLAGS["max_size"].default,
            "size": list(size) if size else "scale the image so that its longer side is at most max_size, then resize "
                    "each side to the nearest k * stride + 1 pixels, k at least 1, bilinear with antialiasing"},
        "postprocessing": _postprocessing(graph, payload["options"])}


def _inputs(graph: Graph, size: Size | None, classes: int) -> list[dict]:
    height, width = size or ("height", "width")
    batch = 1 if size else "batch"
    shapes = {"image": [batch, 3, height, width], "labels": [batch, classes]}
    meaning = {"labels": "1 for each class that the image is known to show; a row of zeros stands for the classes that "
                         "logits predict: those above 0, the highest at least"}
    return [{"name": name, "shape": shapes[name], "type": "float32", **({"meaning": meaning[name]} if name in meaning
                                                                       else {})} for name in graph.inputs]


def _outputs(graph: Graph, classes: int) -> list[dict]:
    cells = "rows", "columns"
    if isinstance(graph, DeepLabGraph):
        return [{"name": "logits", "shape": ["batch", classes + 1, *cells],
                 "meaning": "before softmax; channel 0 is background, k + 1 is class k"}]
    found = [{"name": "logits", "shape": ["batch", classes],
              "meaning": "before sigmoid, one for each class: the mean of its cam"},
             {"name": "cam", "shape": ["batch", classes, *cells], "meaning": "class activation maps before ReLU"}]
    if graph.mapped:
        found.append({"name": "maps", "shape": ["batch", classes, *cells],
                      "meaning": f"the class maps of seed {graph.network.seed.name!r} of this one view, in [0, 1]: "
                                 "posterior probabilities against background; 0 for classes that are not shown"})
    return found


def _postprocessing(graph: Graph, options: dict) -> dict[str, object]:
    found = {"resampling": "bilinear, align_corners=True: the first and last cells of a grid lie on the first and last "
                           "pixels of the image",
             "threshold": FLAGS["bg_threshold"].default,
             "mask": "resample the probabilities to the size of the photo; foreground probability of a pixel: best / "
                     "(best + background), best: its highest class; the mask is 0 where that is below threshold, else "
                     "that class + 1"}
    if isinstance(graph, DeepLabGraph):
        steps = ["resample the logits to the scaled photo's grid of round((side - 1) / 8) + 1 cells a side; of several "
                 "scales and flips, average them there",
                 "softmax over channels", "leave out classes that are nowhere above 0.05, the likeliest aside, and "
                 "divide by the sum over the channels that are left"]
        return {"steps": steps, "softmax_axis": 1, **found}
    steps = [*_map_steps(graph), "background: (1 - highest map) ** bg_alpha; divide by the sum over classes and "
             "background"]
    return {"steps": steps, "bg_alpha": _bg_alpha(options),
            **({"sharpness": getattr(graph.network.seed, "sharpness", 1.0)} if graph.mapped else {}), **found}


def _bg_alpha(options: dict) -> float:
    """What step 3 takes by default after the run that wrote the checkpoint."""
    layout = DATASETS.get(options.get("dataset"))
    defaults = step_defaults(layout.defaults if layout else {}, "masks", options.get("method"))
    return defaults.get("bg_alpha", FLAGS["bg_alpha"].default)


def _map_steps(graph: ClassifierGraph) -> list[str]:
    if graph.mapped:
        return ["resample maps to a grid of 4-pixel cells; of several scales and flips, average them there",
                "raise to the power of sharpness, then divide each class's map by its maximum"]
    seed = getattr(getattr(graph.network, "seed", None), "name", "cam")
    note = [] if seed == "cam" else [f"the checkpoint's own seed, {seed!r}, is not in the file: these are plain CAMs"]
    return [*note, "resample ReLU(cam) of the classes that the image shows to a grid of 4-pixel cells; of several "
            "scales and flips, add them up there", "divide each class's map by its maximum"]
