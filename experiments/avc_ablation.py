"""Which terms of AVC do what: its head trained on stored features with each term alone, without each, and with all.

    python -m experiments.avc_ablation RUN/model_best.pth.tar --data_root DATA --ids output/subsets/third.txt

The CAM and the features come from a finished AVC classifier and stay as they are; a new head is trained on them by the
terms, schedule and optimiser of stage 1 (`src.seeds.avc`). This is stage 1 but for two things: its CAM grows meanwhile,
and it cuts new crops every epoch, where here each image is seen whole (long side --max_size, padded to a square) beside
one of four fixed second views. Refined CAMs and affinities are scored on the cells of the images of --ids, with ground
truth that no training has seen, at the fixed threshold and at the best. Mean and standard deviation over seeds.
"""
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.measure import Parser
from experiments.affinity import pair_quality
from models.backbone import for_inference
from models.classifier import Classifier
from models.weights import load_model, unpack
from src.seeds import attach
from src.seeds.avc.head import TRAINING_GRID, affinity_vectors
from src.seeds.avc.seed import RAMP, RELABEL, TERMS, AffinityConsistency, AvcConfig, Look, Pair, affinity_terms
from src.seeds.avc.views import View, cut, draw_view, valid_cells, valid_pixels
from src.training.optimiser import build_optimiser, set_rates
from utils.config import DataConfig, Machine, TrainConfig
from utils.datasets import Dataset, open_dataset
from utils.errors import UserError
from utils.grids import Size, resize_tensor, snapped_size
from utils.labels import IGNORE
from utils.loader import EpochBatches, Views
from utils.log import progress
from utils.maps import foreground_probability, with_background
from utils.metrics import SweepHistogram, scores
from utils.options import FLAGS
from utils.runtime import run_main

VIEWS, STRIDE = 4, 16
BG_ALPHA = FLAGS["bg_alpha"].default
MIDDLE = 50  # of the sweep's 101 thresholds: 0.5

# Of n images: CAM (n, K, h, w), descriptions (n, D, h, w), which pixels are no padding (n, 1, H, W).
Seen = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Stored:
    """What the head sees of every image.  whole: of its square.  second: of each of the second `views`.
    present: (n, K) bool, the classes of the images."""
    whole: Seen
    second: list[Seen]
    views: list[View]
    present: torch.Tensor


@torch.no_grad()
def stored(classifier: Classifier, dataset: Dataset, side: int, machine: Machine) -> Stored:
    """What the head sees of a split's images, each with long side `side` in the upper left corner of a square of zeros.

    The first of the second views is the horizontal flip.
    """
    torch.manual_seed(0)
    views = [View((0, 0, side, side), (side, side), True)] + [draw_view((side, side)) for _ in range(VIEWS - 1)]
    parts = [[] for _ in range(1 + VIEWS)]
    for i in progress(range(len(dataset)), "features"):
        image = dataset.image(i)
        longest = max(image.shape[:2])
        (seen,) = Views((side / longest,), longest, STRIDE, classifier.backbone.normalise)(image)
        square = torch.zeros(1, 3, side, side)
        square[0, :, :seen.shape[1], :seen.shape[2]] = seen
        looks = [(square, valid_pixels(square))] + [cut(square, view) for view in views]
        for kept, (image, pixels) in zip(parts, looks):
            with machine.autocast():
                features = classifier.backbone(image.contiguous(memory_format=torch.channels_last))
                cam = classifier.cam(features)
                described = classifier.seed.head.describe(features[classifier.backbone.stages[1]], image, TRAINING_GRID)
            kept.append((cam.half(), described.half(), pixels))
    whole, *second = (tuple(torch.cat(column) for column in zip(*kept)) for kept in parts)
    return Stored(whole, second, views, torch.from_numpy(dataset.labels > 0))


def train_head(classifier: Classifier, data: Stored, how: dict[str, object], config: TrainConfig, settings: AvcConfig
               ) -> AffinityConsistency:
    """A new seed whose head is trained by the weighted terms, as stage 1 would.  how: what builds the seed."""
    torch.manual_seed(config.seed)
    new, weights = AffinityConsistency.build(classifier, **how), settings.weights()
    optimiser = build_optimiser(new.head, config)
    epochs = [EpochBatches(len(data.present), config.batch_size, config.seed, epoch) for epoch in range(config.epochs)]
    total = sum(map(len, epochs))
    for step, batch in enumerate(batch for epoch in epochs for batch in epoch):
        indices, done = torch.tensor([index for _, index in batch]), step / total
        which = int(torch.randint(VIEWS, ()))
        first, second = ([part[indices] for part in seen] for seen in (data.whole, data.second[which]))
        looks = [Look(torch.empty(0), cam.float(), described.float()) for cam, described, _ in (first, second)]
        pair = Pair(first[2].shape[-2:], data.views[which], first[2], second[2], *looks)
        new.head.observe(looks[0].described, valid_cells(pair.pixels, looks[0].described.shape[-2:]))
        factor = min(1.0, max(0.0, (done - settings.avc_start) / RAMP))
        if factor and any(weights.values()):
            found = affinity_terms(new.head, pair, data.present[indices], weights, done >= RELABEL)
            set_rates(optimiser, done)
            optimiser.zero_grad(set_to_none=True)
            (factor * sum(weights[name] * value for name, value in found.items())).backward()
            optimiser.step()
    return new.eval()


@torch.no_grad()
def quality(seed: AffinityConsistency, whole: Seen, dataset: Dataset, scored: Sequence[int]) -> tuple[float, ...]:
    """(mIoU fixed, mIoU oracle, mean A in the object, across its border, ROC area) over the images `scored`."""
    sweep, pairs = SweepHistogram(len(dataset.classes) + 1), []
    for i in scored:
        cam, described, pixels = (part[i:i + 1] for part in whole)
        _, matrix = seed.head.affinity(described.float())
        grid = tuple(described.shape[-2:])
        valid = valid_cells(pixels, grid)
        maps = resize_tensor(cam.float().relu(), grid).flatten(2)
        refined = seed.head.refined(maps, affinity_vectors(matrix, valid), valid).unflatten(2, grid)
        truth = square_truth(dataset.mask(i), pixels.shape[-1], grid)
        rows, columns = (int(valid.view(grid).any(dim=1 - axis).sum()) for axis in (0, 1))
        keys = np.flatnonzero(dataset.label(i))
        merged = seed.merge([(refined[..., :rows, :columns],)], keys, (rows, columns))
        sweep.update(*foreground_probability(with_background(merged, BG_ALPHA), keys),
                     truth.view(grid)[:rows, :columns].numpy().astype(np.uint8))
        kept = valid[0]
        pairs.append(pair_quality(matrix[0][kept][:, kept], truth[kept]))
    same, across, _, area = np.mean([entry for entry in pairs if entry is not None], axis=0)
    return scores(sweep.confusions()[MIDDLE])["miou"], sweep.oracle()[1]["miou"], same, across, area


def square_truth(mask: np.ndarray, side: int, grid: Size) -> torch.Tensor:
    """Ground truth of an image at the cells of its padded square: (N,) int, 255 in padding."""
    shown = snapped_size([length * side / max(mask.shape) for length in mask.shape], STRIDE)
    truth, places = torch.full(grid, IGNORE), []
    for full, length, count in zip(mask.shape, shown, grid):
        at = np.linspace(0, side - 1, count)
        places.append((at[at < length - 0.5] * (full - 1) / (length - 1)).round().astype(int).clip(0, full - 1))
    truth[:len(places[0]), :len(places[1])] = torch.from_numpy(mask[np.ix_(*places)].astype(np.int64))
    return truth.flatten()


def rows_of(settings: AvcConfig) -> dict[str, AvcConfig]:
    """{name: settings}: every term alone, all without it, all, and none (a random projection)."""
    full = {f"avc_{name}": weight or 1.0 for name, weight in settings.weights().items()}  # one left out counts 1
    kept = {"none (random projection)": (), **{f"{name} alone": (name,) for name in TERMS},
            **{f"all but {name}": [other for other in TERMS if other != name] for name in TERMS}, "all": TERMS}
    return {row: replace(settings, **{name: weight * (name[4:] in names) for name, weight in full.items()})
            for row, names in kept.items()}


def main() -> None:
    parser = Parser("experiments.avc_ablation", __doc__)
    parser.add_argument("checkpoint", help="stage-1 checkpoint of --method avc")
    parser.flag("data_root", "data/oxford-iiit-pet", "Pet dataset")
    parser.add_argument("--ids", metavar="FILE", help="score only these images (default: all)")
    parser.flag("limit", None, "train on the first so many images")
    parser.flag("max_size", 257, "long side in pixels")
    parser.flag("seeds", 3, "how many", like="limit")
    parser.flag("precision", "fp32", "arithmetic of the backbone")
    args = parser.parse_args()
    payload = load_model(args.checkpoint, steps=("stage1",))
    record = payload["networks"]["classifier"]
    how = dict(record["seed"])
    if how.pop("name") != "avc":
        raise UserError(f"{args.checkpoint} has no affinity head; pass a stage-1 checkpoint of --method avc")
    config = TrainConfig.of(payload["options"])
    dataset, chosen = (open_dataset(DataConfig("pet", args.data_root, ids=ids, limit=args.limit))
                       for ids in (None, args.ids))
    scored = [i for i, image_id in enumerate(dataset.ids) if image_id in set(chosen.ids)]
    classifier = for_inference(unpack(record, attach))
    data = stored(classifier, dataset, snapped_size((args.max_size,) * 2, STRIDE)[0],
                  Machine(torch.device("cpu"), args.precision))
    columns = ("mIoU fixed", "oracle", "A in object", "A across", "ROC area")
    print(f"{'terms':<28}" + "".join(f"{name:>16}" for name in columns))
    for name, weighted in rows_of(AvcConfig.of(payload["options"])).items():
        found = np.array([quality(train_head(classifier, data, how, replace(config, seed=seed), weighted), data.whole,
                                  dataset, scored) for seed in range(args.seeds)])
        spread = found.std(axis=0, ddof=1) if args.seeds > 1 else np.zeros(found.shape[1])
        print(f"{name:<28}" + "".join(f"{mean:>9.3f} ±{deviation:.3f}" for mean, deviation in
                                      zip(found.mean(axis=0), spread)), flush=True)


if __name__ == "__main__":
    run_main(main)
