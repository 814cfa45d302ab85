"""Small datasets true to the layouts of PASCAL VOC 2012 and MS COCO 2014, two coloured shapes a picture; and, of noise,
to those of Pet and of the plain folder."""
import json

import numpy as np
from PIL import Image

from utils.config import DataConfig
from utils.datasets import open_dataset
from utils.datasets.voc import CLASSES
from utils.labels import save_mask

HEIGHT, WIDTH = 50, 74
VOC_SHOWN = ("aeroplane", "dog", "tvmonitor")  # the first, one in the middle and the last of VOC's 20 classes
VOC_LISTS = {"train": 8, "val": 3, "test": 2, "extra": 2}  # images a list; "extra" is in trainaug alone
CATEGORIES = {1: "person", 17: "cat", 18: "dog", 90: "toothbrush"}  # as COCO's ids, with gaps
H, W = 6, 8  # of a picture in Pet's tree
TRIMAP = np.array([[1, 1, 2, 2, 3, 3, 1, 2]] * H, np.uint8)
LISTS = {"trainval": [("Persian_1", 6), ("beagle_1", 2), ("Persian_2", 6)], "test": [("Abyssinian_1", 1)]}
COLOURS = np.array([(220, 60, 40), (60, 200, 70), (70, 90, 230), (220, 210, 60)])


def opened(name, root, split=None, ids=None, **options):
    """The split of a dataset that these options name."""
    return open_dataset(DataConfig(name, str(root), split, None if ids is None else str(ids), **options))


def draw(rng, kinds, height=HEIGHT, width=WIDTH):
    """Noise with one rectangle a kind, side by side.  Returns (image, [(top, left, bottom, right) of each])."""
    image = rng.integers(90, 160, (height, width, 3))
    boxes = []
    for place, kind in enumerate(kinds):
        left = place * width // len(kinds) + 6
        box = (int(rng.integers(5, 12)), left, height - int(rng.integers(5, 12)), left + width // len(kinds) - 12)
        image[box[0]:box[2], box[1]:box[3]] = COLOURS[kind] + rng.integers(-15, 15, 3)
        boxes.append(box)
    return image.astype(np.uint8), boxes


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def save_jpeg(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)


def annotation(objects):
    """The XML of one VOC image.  objects: (class name, whether difficult)."""
    rows = "".join(f"<object><name>{name}</name><difficult>{int(hard)}</difficult></object>" for name, hard in objects)
    return f"<annotation><segmented>1</segmented>{rows}</annotation>"


def make_voc(root, counts=VOC_LISTS):
    """VOC's tree; image i of a list shows the kinds i and i + 1 of VOC_SHOWN, the second of which is difficult in the
    first image.  Returns {list: ids}."""
    rng, ids, number = np.random.default_rng(0), {}, 0
    for name, count in counts.items():
        ids[name] = []
        for i in range(count):
            number += 1
            ids[name].append(f"2007_{number:06d}")
            _voc_image(root, ids[name][-1], name, rng, [i % 3, (i + 1) % 3], number == 1)
    ids["trainval"] = ids["train"] + ids["val"]
    ids["trainaug"] = ids["train"] + ids.pop("extra", [])
    for name, chosen in ids.items():
        write(root / "ImageSets" / "Segmentation" / f"{name}.txt", "\n".join(chosen) + "\n")
    return ids


def _voc_image(root, image_id, name, rng, kinds, difficult):
    image, boxes = draw(rng, kinds)
    save_jpeg(root / "JPEGImages" / f"{image_id}.jpg", image)
    if name == "test":
        return
    shown = [VOC_SHOWN[kind] for kind in kinds]
    write(root / "Annotations" / f"{image_id}.xml", annotation(zip(shown, (False, difficult))))
    mask = np.zeros(image.shape[:2], np.uint8)
    for box, label in zip(boxes, shown):
        mask[box[0]:box[2], box[1]:box[3]] = 255  # VOC's border of ignored pixels
        mask[box[0] + 1:box[2] - 1, box[1] + 1:box[3] - 1] = CLASSES.index(label) + 1
    save_mask(root / ("SegmentationClassAug" if name == "extra" else "SegmentationClass") / f"{image_id}.png", mask)


def coco_stem(split, number):
    return f"COCO_{split}_{number:012d}"


def polygon(box):
    top, left, bottom, right = box
    return [[left, top, right, top, right, bottom, left, bottom]]


def runs(mask):
    """Uncompressed run-length encoding, as COCO has it for crowds: columns first, starting with background."""
    flat = np.concatenate([[0], mask.T.reshape(-1), [0]]).astype(np.int8)
    changes = np.flatnonzero(np.diff(flat))
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()}


def coco_annotation(number, image, category, shape, crowd=0):
    return {"id": number, "image_id": image, "category_id": category, "segmentation": shape, "iscrowd": crowd,
            "area": 1.0, "bbox": [0, 0, 1, 1]}


def make_coco(root, train=9, val=4):
    """COCO's tree.  Image 9 of a split, and 4 of val, has no object; image 2 is grey; image 3 has a crowd across both
    objects; image 1 has a small object on a large one.  Returns {split: image ids}."""
    rng, ids, order = np.random.default_rng(1), {}, list(CATEGORIES)
    for split, count in (("train2014", train), ("val2014", val)):
        images, annotations = [], []
        for number in range(1, count + 1):
            kinds = [number % 4, (number + 1) % 4]
            image, boxes = draw(rng, kinds, HEIGHT + number, WIDTH)
            save_jpeg(root / split / f"{coco_stem(split, number)}.jpg", image[..., 0] if number == 2 else image)
            images.append({"id": 7 * number, "file_name": f"{coco_stem(split, number)}.jpg", "height": HEIGHT + number,
                           "width": WIDTH})
            if (split, number) in (("train2014", 9), ("val2014", 4)):
                continue
            shapes = [(order[kind], polygon(box), 0) for kind, box in zip(kinds, boxes)]
            if number == 1:
                top, left, bottom, right = boxes[0]
                shapes.insert(0, (90, polygon((top + 4, left + 4, top + 14, left + 14)), 0))
            if number == 3:
                crowd = np.zeros(image.shape[:2], np.uint8)
                crowd[2:20] = 1
                shapes.append((1, runs(crowd), 1))
            annotations += [coco_annotation(100 * number + i, 7 * number, *shape) for i, shape in enumerate(shapes)]
        # As in COCO, neither images nor annotations nor categories need come in order.
        content = {"images": images[::-1], "annotations": annotations[::-1],
                   "categories": [{"id": key, "name": name} for key, name in reversed(CATEGORIES.items())]}
        write(root / "annotations" / f"instances_{split}.json", json.dumps(content))
        ids[split] = [coco_stem(split, number) for number in range(1, count + 1)]
    return ids


def save_picture(path, size=(H, W), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def save_grey(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def write_lists(root, lists, comment="#Image CLASS-ID SPECIES BREED ID\n"):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for name, rows in lists.items():
        lines = "".join(f"{image_id} {class_id} 1 1\n" for image_id, class_id in rows)
        (root / "annotations" / f"{name}.txt").write_text(comment + lines)


def make_pet(root):
    """A Pet tree of four images and three classes, whose ids 1, 2, 6 leave a gap.  Returns its root."""
    write_lists(root, {**LISTS, "list": LISTS["trainval"] + LISTS["test"]})
    for rows in LISTS.values():
        for image_id, _ in rows:
            save_picture(root / "images" / f"{image_id}.jpg")
            save_grey(root / "annotations" / "trimaps" / f"{image_id}.png", TRIMAP)
    return root


def make_folder(root):
    """A plain folder: three images, one with two labels and one with none, and masks.  Returns its root."""
    for image_id in "abc":
        save_picture(root / "images" / f"{image_id}.png", size=(H, 4))
        save_grey(root / "masks" / f"{image_id}.png", [[0, 1, 2, 255]] * H)
    (root / "labels.csv").write_text("image_id,classes\na,tree;sky\nb,\nc,sky\n")
    return root
