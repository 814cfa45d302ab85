"""The dense CRF: a pool of processes beside one, an image's own classes beside all 21, torch beside pydensecrf.

    python -m benchmarks.crf [--data_root data/oxford-iiit-pet] [--count 100] [--presets psa irn ...]

Images of the toy dataset, or of --data_root (images/*.jpg), all scaled to 500x375. Each has two classes: background,
and one that a rough blob with noise stands for. The form with 21 classes, as published code runs it, has 19 more of low
random scores. One process means one thread.

- crf_pool_*: everything from the image file to the mask, `--workers` processes (pydensecrf) or threads (torch, which
  the steps have loaded by then) beside one. Seconds include the start of the processes; seconds_started leaves out what
  the same pool takes for four tiny images. max_error 0: the same pixels.
- crf_fields_*: the two CRFs of an affinity label sharing their lattices, beside one after the other.
- crf_torch_*: torch beside pydensecrf by preset, the CRF alone.  crf_batch: 4 images at once beside one at a time, on a
  GPU where there is one.

Agreement is the ratio of pixels whose most probable class is the same.
"""
import importlib.util
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from benchmarks.measure import Parser, Table, extra_mb, timed
from data.make_toy import make_toy
from utils.crf import CRF, PRESETS, dense_crf
from utils.errors import UserError
from utils.grids import resize_image, resize_maps
from utils.images import read_image
from utils.options import FLAGS
from utils.parallel import map_parallel
from utils.runtime import run_main

SIZE, ALL, BATCH = (375, 500), 21, 4  # (H, W); VOC's classes, background included; images at once


def scene(path: Path, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """An image (375, 500, 3) and its class probabilities (classes, 375, 500): a blob somewhere near the middle."""
    image = np.ascontiguousarray(resize_image(read_image(path), SIZE))
    rng = np.random.default_rng(list(path.name.encode()))
    y, x = np.mgrid[-1:1:47j, -1:1:63j]
    top, left, height, width = rng.uniform((-0.2, -0.2, 0.4, 0.4), (0.2, 0.2, 0.8, 0.8))
    blob = np.exp(-(((y - top) / height) ** 2 + ((x - left) / width) ** 2))
    two = np.stack([1 - blob, blob]) * 0.8 + 0.3 * rng.random((2, *blob.shape))
    scores = resize_maps(np.concatenate([two, 0.02 * rng.random((classes - 2, *blob.shape))]), SIZE)
    return image, scores / scores.sum(axis=0)


def mask(path: Path, crf: CRF, classes: int = 2) -> tuple[np.ndarray, int]:
    """(the mask of an image file, the checksum of its posterior)."""
    posterior = dense_crf(*scene(path, classes), *crf)
    return posterior.argmax(axis=0).astype(np.uint8), zlib.crc32(posterior.tobytes())


def pools(paths: Sequence[Path], backends: Sequence[str], preset: str, workers: int) -> Iterator[dict]:
    """Cases of the project's way, beside one process with the same classes and one with 21."""
    crfs = {name: CRF(PRESETS[preset], name, "cpu") for name in backends}
    slow, everything = timed(lambda: [mask(path, crfs[backends[0]], ALL) for path in paths], 1)
    for name, crf in crfs.items():
        reference, expected = timed(lambda: [mask(path, crf) for path in paths], 1)
        how = workers, "CRF", crf.backend == "torch"
        start, _ = timed(lambda: list(map_parallel(partial(_tiny, crf=crf), range(4), *how)), 1)
        seconds, found = timed(lambda: list(map_parallel(partial(mask, crf=crf), paths, *how)), 1)
        identical = [one[1] for one in found] == [one[1] for one in expected]
        for beside, other, results in (("one_process", reference, expected), (f"{ALL}_classes", slow, everything)):
            error = 0.0 if identical and results is expected else None
            agreement = np.mean([(one[0] == two[0]).mean() for one, two in zip(found, results)])
            yield dict(case=f"crf_pool_{name}_beside_{beside}", seconds=seconds, reference_seconds=other, memory=None,
                       error=error, agreement=round(float(agreement), 5), seconds_started=round(seconds - start, 3),
                       ratio_started=round(other / (seconds - start), 1))


def _tiny(item: int, crf: CRF) -> None:
    dense_crf(np.zeros((8, 8, 3), np.uint8), np.full((2, 8, 8), 0.5), *crf)  # as it takes all the imports


def beside(case: str, groups: Sequence[Sequence[Path]], ours: Callable, reference: Callable) -> dict:
    """A case from the scenes of each group of paths, the two ways timed in turns; each returns a list of posteriors."""
    seconds, reference_seconds, error, same = 0.0, 0.0, 0.0, []
    for paths in groups:
        scenes = [scene(path) for path in paths]
        if not same:
            ours(scenes), reference(scenes)  # imports, and what is kept from image to image
            memory, reference_memory = extra_mb(lambda: ours(scenes)), extra_mb(lambda: reference(scenes))
        lasted, found = timed(lambda: ours(scenes), 1)
        reference_lasted, expected = timed(lambda: reference(scenes), 1)
        seconds, reference_seconds = seconds + lasted, reference_seconds + reference_lasted
        for one, other in zip(found, expected):
            error = max(error, float(abs(one - other).max()))
            same.append((one.argmax(axis=-3) == other.argmax(axis=-3)).mean())
    return dict(case=case, seconds=seconds, reference_seconds=reference_seconds, memory=memory,
                error=error, agreement=round(float(np.mean(same)), 5),
                lowest_agreement=round(float(np.min(same)), 5), reference_extra_mb=reference_memory)


def comparisons(paths: Sequence[Path], backends: Sequence[str], presets: Sequence[str]) -> Iterator[dict]:
    """Cases of the CRF alone: fields that share lattices, torch beside pydensecrf, several images at once."""
    from utils.crf.mean_field import mean_field
    from utils.options import pick_device
    params, device = PRESETS[presets[0]], str(pick_device("auto"))

    def each(scenes, *how):
        return [dense_crf(*one, *how) for one in scenes]

    def batch(scenes):
        energies = [-np.log(probabilities.clip(1e-5, 1))[None] for _, probabilities in scenes]
        return [found[0] for found in mean_field([image for image, _ in scenes], energies, params, device)]

    singles = [[path] for path in paths]
    for name in backends:
        yield beside(f"crf_fields_{name}", singles[:max(len(paths) // 4, 1)],
                     lambda scenes: each([(image, _two(maps)) for image, maps in scenes], params, name),
                     lambda scenes: [np.stack(each([(image, maps) for maps in _two(maps)], params, name))
                                     for image, maps in scenes])
    groups = [paths[i:i + BATCH] for i in range(0, len(paths), BATCH)]
    yield beside(f"crf_batch_{device}", groups, batch, lambda scenes: each(scenes, params, "torch", device))
    for preset in presets if "pydensecrf" in backends else ():
        yield beside(f"crf_torch_{preset}", singles, lambda scenes: each(scenes, PRESETS[preset], "torch"),
                     lambda scenes: each(scenes, PRESETS[preset], "pydensecrf"))


def _two(maps):
    """(2, C, H, W): with a strong and with a weak background, as affinity labels are made."""
    fields = np.stack([maps * np.array([weight, 1], np.float32)[:, None, None] for weight in (2, 0.5)])
    return fields / fields.sum(axis=1, keepdims=True)


def image_files(root: str | Path, count: int) -> list[Path]:
    """The first so many images of a dataset's folder; UserError if it has none."""
    paths = sorted(Path(root).glob("images/*.jpg"))[:count]
    if not paths:
        raise UserError(f"no images/*.jpg in {root}; pass a folder laid out as Oxford-IIIT Pet with --data_root")
    return paths


def main() -> None:
    parser = Parser("benchmarks.crf", __doc__)
    parser.add_argument("--data_root", help="folder with images/*.jpg (default: toy images, drawn for the run)")
    parser.flag("count", 100, "images", like="limit")
    parser.add_argument("--presets", nargs="+", choices=tuple(PRESETS), default=tuple(PRESETS),
                        help="compared between the backends; the first is used for the rest (default: all)")
    parser.flag("workers", FLAGS["workers"].default, "processes of the pool")
    args = parser.parse_args()
    import torch
    torch.set_num_threads(1)
    backends = ("pydensecrf", "torch") if importlib.util.find_spec("pydensecrf") else ("torch",)
    with tempfile.TemporaryDirectory() as folder:
        if args.data_root is None:
            make_toy(Path(folder) / "toy", train=args.count, test=1, size=430)
        paths = image_files(args.data_root or Path(folder) / "toy", args.count)
        table = Table()
        for row in chain(pools(paths, backends, args.presets[0], args.workers),
                         comparisons(paths, backends, args.presets)):
            table.add(**row)
    table.finish()


if __name__ == "__main__":
    run_main(main)
