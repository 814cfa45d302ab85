"""Which terms of AVC do what: its head trained on stored features with each term alone, without each, and with all.

    python -m benchmarks.avc_ablation output/stage1_resnet50/model_best.pth.tar --data_root DATA --ids output/subsets/third.txt

The CAM and the features come from a finished AVC classifier and stay as they are; a new head is trained on them by the
terms, schedule and optimiser of stage 1 (`src.avc`). This is stage 1 but for two things: its CAM grows meanwhile, and it
cuts new crops every epoch, where here each image is seen whole (long side --max_size, padded to a square) beside one of
four fixed second views. Refined CAMs and affinities are scored on the cells of the images of --ids, with ground truth
that no training has seen, at the fixed threshold and at the best. Mean and standard deviation over seeds.
"""
import argparse

import numpy as np
import torch

from benchmarks.affinity import pair_quality
from models import avc
from models.build import unpack
from models.fuse import for_inference
from models.weights import load_model
from src.avc import DIMS, RELABEL, STEPS, TERMS, Pair, View, affinity_terms, cut, draw_view, ramp, shown_pixels, valid_cells
from src.cams import refined_cam
from src.engine import autocast
from utils.datasets import open_dataset
from utils.errors import UserError
from utils.labels import IGNORE
from utils.loader import EpochBatches, scaled_views
from utils.log import progress
from utils.maps import foreground_share, snapped_size, with_background
from utils.metrics import SweepHistogram, scores
from utils.options import FLAGS
from utils.runtime import run_main

VIEWS = 4
BG_ALPHA = FLAGS["bg_alpha"].default


def squares(dataset, side):
    """Every image, long side `side`, in the upper left corner of a square of zeros: yields (3, side, side)."""
    for i in range(len(dataset)):
        image = dataset.image(i)
        view = scaled_views(image, (side / max(image.shape[:2]),), max(image.shape[:2]), 16)[0]
        square = torch.zeros(3, side, side)
        square[:, :view.shape[1], :view.shape[2]] = view
        yield square


@torch.no_grad()
def stored(network, dataset, side, precision):
    """What the head sees of every image and view: ([(cam (n, K, h, w), descriptions (n, D, h, w), shown (n, 1, H, W))], views).

    The first entry is of the whole squares, the others of the second views; the first of these is the mirror image.
    """
    torch.manual_seed(0)
    views = [View((0, 0, side, side), (side, side), True)] + [draw_view((side, side)) for _ in range(VIEWS - 1)]
    parts = [[] for _ in range(1 + VIEWS)]
    for square in progress(squares(dataset, side), "features", len(dataset)):
        seen = [(square[None], shown_pixels(square[None]))] + [cut(square[None], view) for view in views]
        for kept, (image, shown) in zip(parts, seen):
            with autocast(image.device, precision):
                _, cam, described = network.training_maps(image.contiguous(memory_format=torch.channels_last))
            kept.append((cam.half(), described.half(), shown))
    return [[torch.cat(column) for column in zip(*kept)] for kept in parts], views


def train_head(data, views, present, weights, options, seed):
    """A head trained by the weighted terms, as stage 1 would."""
    torch.manual_seed(seed)
    colour = options["avc_colour"]
    head = avc.AffinityHead(data[0][1].shape[1] - (avc.COLOURS if colour else 0), DIMS, STEPS, colour)
    side = data[0][2].shape[-2:]
    optimizer = torch.optim.SGD(head.parameters(), lr=options["lr"], momentum=options["momentum"],
                                weight_decay=options["weight_decay"])
    epochs = [EpochBatches(len(present), options["batch_size"], seed, epoch) for epoch in range(options["epochs"])]
    total, step = sum(map(len, epochs)), 0
    for batch in (batch for epoch in epochs for batch in epoch):
        indices = torch.tensor([index for _, index in batch])
        which = int(torch.randint(VIEWS, ()))
        first, second = ([part[indices] for part in data[number]] for number in (0, 1 + which))
        pair = Pair(side, views[which], first[2], second[2], (None, first[0].float(), first[1].float()),
                    (None, second[0].float(), second[1].float()))
        head.observe(pair.first[2], valid_cells(pair.shown, pair.first[2].shape[-2:]))
        factor = ramp(step / total, options["avc_start"])
        if factor and any(weights.values()):
            found = affinity_terms(head, pair, present[indices], weights, step / total >= RELABEL)
            for group in optimizer.param_groups:
                group["lr"] = options["lr"] * (1 - step / total) ** 0.9
            optimizer.zero_grad(set_to_none=True)
            (factor * sum(weights[name] * value for name, value in found.items())).backward()
            optimizer.step()
        step += 1
    return head.eval()


@torch.no_grad()
def quality(head, data, dataset, scored, side):
    """(mIoU fixed, mIoU oracle, mean A in the object, across its border, ROC area) over the images `scored`."""
    sweep, pairs = SweepHistogram(len(dataset.classes) + 1), []
    for i in scored:
        cam, described, shown = (part[i:i + 1] for part in data[0])
        _, matrix = head.affinity(described.float())
        grid = described.shape[-2:]
        valid = valid_cells(shown, grid)
        maps = avc.resized(cam.float().relu(), grid).flatten(2)
        refined = head.refined(maps, avc.affinity_vectors(matrix, valid), valid)[0].unflatten(1, grid)
        truth = square_truth(dataset.mask(i), side, grid)
        rows, columns = (int(valid.view(grid).any(dim=1 - axis).sum()) for axis in (0, 1))
        keys = np.flatnonzero(dataset.label(i))
        shares = with_background(refined_cam(refined[keys, :rows, :columns].numpy(), 1, head), BG_ALPHA)
        sweep.update(*foreground_share(shares, keys), truth.view(grid)[:rows, :columns].numpy().astype(np.uint8))
        kept = valid[0]
        pairs.append(pair_quality(matrix[0][kept][:, kept], truth[kept]))
    fixed = [entry for entry in zip(sweep.thresholds(), sweep.confusions()) if abs(entry[0] - 0.5) < 1e-6][0][1]
    same, across, _, area = np.mean([entry for entry in pairs if entry is not None], axis=0)
    return scores(fixed)["miou"], sweep.oracle()[1]["miou"], same, across, area


def square_truth(mask, side, grid):
    """Ground truth of an image at the cells of its padded square: (N,) int, 255 in padding."""
    shown = snapped_size([length * side / max(mask.shape) for length in mask.shape], 16)
    truth, places = torch.full(grid, IGNORE), []
    for full, length, count in zip(mask.shape, shown, grid):
        at = np.linspace(0, side - 1, count)
        places.append((at[at < length - 0.5] * (full - 1) / (length - 1)).round().astype(int).clip(0, full - 1))
    truth[:len(places[0]), :len(places[1])] = torch.from_numpy(mask[np.ix_(*places)].astype(np.int64))
    return truth.flatten()


def rows_of(options):
    """{name: weights}: every term alone, all without it, all, and none (a random projection)."""
    full = {name: options[f"avc_{name}"] or 1.0 for name in TERMS}  # a term that the run left out counts 1
    return {"none (random projection)": dict.fromkeys(TERMS, 0.0),
            **{f"{name} alone": {other: full[other] * (other == name) for other in TERMS} for name in TERMS},
            **{f"all but {name}": {other: full[other] * (other != name) for other in TERMS} for name in TERMS},
            "all": full}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.avc_ablation", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="stage-1 checkpoint of --method avc")
    parser.add_argument("--data_root", default="data/oxford-iiit-pet", help="Pet dataset (default: %(default)s)")
    parser.add_argument("--ids", metavar="FILE", help="score only these images (default: all)")
    parser.add_argument("--limit", type=FLAGS["limit"].type, help="train on the first so many images")
    parser.add_argument("--max_size", type=FLAGS["max_size"].type, default=257, help="pixels (default: %(default)s)")
    parser.add_argument("--seeds", type=FLAGS["limit"].type, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    payload = load_model(args.checkpoint, steps=("stage1",))
    network = unpack(payload["networks"]["classifier"])
    if network.avc is None:
        raise UserError(f"{args.checkpoint} has no affinity head; pass a stage-1 checkpoint of --method avc")
    side = snapped_size((args.max_size,) * 2, 16)[0]
    dataset = open_dataset("pet", args.data_root, None, args.limit)
    wanted = set(open_dataset("pet", args.data_root, None, args.limit, args.ids).ids)
    scored = [i for i, image_id in enumerate(dataset.ids) if image_id in wanted]
    data, views = stored(for_inference(network), dataset, side, args.precision)
    present = torch.from_numpy(np.stack([dataset.label(i) for i in range(len(dataset))])) > 0
    print(f"{'terms':<28}" + "".join(f"{name:>16}" for name in ("mIoU fixed", "oracle", "A in object", "A across",
                                                               "ROC area")))
    for name, weights in rows_of(payload["options"]).items():
        found = np.array([quality(train_head(data, views, present, weights, payload["options"], seed), data, dataset,
                                  scored, side) for seed in range(args.seeds)])
        spread = found.std(axis=0, ddof=1) if args.seeds > 1 else np.zeros(found.shape[1])
        print(f"{name:<28}" + "".join(f"{mean:>9.3f} ±{deviation:.3f}" for mean, deviation in
                                      zip(found.mean(axis=0), spread)), flush=True)


if __name__ == "__main__":
    run_main(main)
