"""MS COCO's instances JSON: one run-length encoded annotation for each class of an image, exact to the pixel."""
import json
from pathlib import Path

import numpy as np

from utils.export.masks import Labelled, MaskSet


def write(folder: Path, masks: MaskSet) -> None:
    """annotations/instances_train2014.json, or ..._val2014.json of a split that is not for training.

    These are the names that `--dataset coco` reads.  Category k + 1 is class k.  `iscrowd` is 0, as 1 would mean a
    group of objects, which readers ignore: pycocotools goes by the kind of `segmentation`, not by this flag.
    The file is written as masks are read; what is kept in memory of an image is its size.
    """
    path = folder / "annotations" / f"instances_{'train' if masks.training else 'val'}2014.json"
    path.parent.mkdir(parents=True)
    head = {"info": {"description": f"masks of split {masks.split}", "version": "1.0"}, "licenses": [],
            "categories": [{"id": k + 1, "name": name, "supercategory": ""} for k, name in enumerate(masks.classes)]}
    images, count = [], 0
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(head, ensure_ascii=False)[:-1] + ', "annotations": [')
        for number, one in enumerate(masks.each("export coco"), start=1):
            height, width = one.mask.shape
            images.append({"id": number, "file_name": one.photo.name, "height": height, "width": width})
            for annotation in _annotations(one):
                count += 1
                row = {"id": count, "image_id": number, **annotation}
                file.write((",\n" if count > 1 else "\n") + json.dumps(row))
        file.write("\n], \"images\": [")
        for number, image in enumerate(images):
            file.write((",\n" if number else "\n") + json.dumps(image, ensure_ascii=False))
        file.write("\n]}\n")


def _annotations(one: Labelled) -> list[dict]:
    from pycocotools import mask as rle
    found = []
    for value in one.shown():
        code = rle.encode(np.asfortranarray(one.mask == value, dtype=np.uint8))
        found.append({"category_id": value, "iscrowd": 0, "area": int(rle.area(code)),
                      "bbox": rle.toBbox(code).tolist(),
                      "segmentation": {"size": list(one.mask.shape), "counts": code["counts"].decode("ascii")}})
    return found
