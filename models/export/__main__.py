"""Write the network of a checkpoint as ONNX: OUT.onnx, and OUT.json, which says how it is used (docs/export.md).

    python -m models.export output/deeplab_resnet38/model_best.pth.tar deeplab.onnx
    python -m models.export output/stage1_resnet50/model_best.pth.tar classifier.onnx --size 449 449

Takes a DeepLab (step 5), or the classifier of a checkpoint of step 1 or 2 with its CAM, and, with the seed `mixture`,
its class maps. The file is compared with PyTorch in onnxruntime before it is put in its place.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path

from models import export
from models.backbone import for_inference
from models.export.usage import usage
from models.weights import load_model, unpack
from src.seeds import attach, check_fitted  # a script, unlike the package around it, may import src
from utils.errors import UserError
from utils.files import atomic_path, write_json
from utils.grids import snapped_size
from utils.options import side
from utils.runtime import run_main

STEPS = ("deeplab", "stage1", "stage2")


def main(argv: Sequence[str] | None = None) -> int:
    """Export a checkpoint.  Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m models.export", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of step 1, 2 or 5, or a published one")
    parser.add_argument("out", metavar="OUT.onnx", help="the file to write; OUT.json is written beside it")
    parser.add_argument("--size", type=side, nargs=2, metavar=("H", "W"),
                        help="height and width of its images in pixels, for runtimes that need a fixed size (default: "
                             "any size)")
    parser.add_argument("--maps", action=argparse.BooleanOptionalAction, default=True,
                        help="of the seed mixture, also its class maps (default: on)")
    args = parser.parse_args(argv)
    out, size = Path(args.out), tuple(args.size) if args.size else None
    if out.suffix != ".onnx":
        parser.error(f"{out} does not end with .onnx")
    for path in (out, out.with_suffix(".json")):
        if path.exists():
            raise UserError(f"{path} is there already; pass another path, or delete it")
    export.packages()
    payload = load_model(args.checkpoint, STEPS)
    kind = next((kind for kind in ("deeplab", "classifier") if kind in payload["networks"]), None)
    if kind is None:
        raise UserError(f"{args.checkpoint} holds no DeepLab and no classifier, but {', '.join(payload['networks'])}; "
                        "pass a checkpoint of step 1 or 5")
    record = payload["networks"][kind]
    check_fitted(record)
    network = for_inference(unpack(record, attach))
    stride = network.backbone.stride
    if size and size != snapped_size(size, stride):
        raise UserError(f"--size {size[0]} {size[1]}: images are resized to k * {stride} + 1 pixels a side, so that "
                        f"maps lie on their corners; pass --size {' '.join(map(str, snapped_size(size, stride)))}")
    graph, gaps = export.graph_of(network, args.maps), []
    with atomic_path(out) as temporary:
        export.write_onnx(temporary, graph, size)
        for one in export.compared_sizes(size, stride):
            gaps.append(export.largest_gap(temporary, graph, one, 1 if size else 2))
            if not gaps[-1] <= export.TOLERANCE:
                raise UserError(f"onnxruntime differs from PyTorch by {gaps[-1]:.1e} of an output's range at {one[0]} "
                                f"x {one[1]} pixels; {out} was not written. Install another version of onnxruntime"
                                + (", or pass --no-maps" if "maps" in graph.outputs else ""))
    write_json(out.with_suffix(".json"), usage(graph, payload, record, size))
    sizes = " and ".join(f"{height} x {width}" for height, width in export.compared_sizes(size, stride))
    print(f"Wrote {out} ({out.stat().st_size / 1e6:.1f} MB, {', '.join(graph.inputs)} -> {', '.join(graph.outputs)}) "
          f"and {out.with_suffix('.json')}; onnxruntime is within {max(gaps):.0e} of PyTorch at {sizes} pixels")
    return 0


if __name__ == "__main__":
    run_main(main)
