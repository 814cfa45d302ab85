"""Defaults that depend on the dataset or on DeepLab's head; each run prints which of them it took."""

DATA_ROOTS = {"pet": "data/oxford-iiit-pet", "voc": "data/VOCdevkit/VOC2012", "coco": "data/coco", "folder": "data/mine"}
TEST_SPLITS = {"pet": "test", "voc": "val", "coco": "val"}  # that step 6 tests on; a folder's training split is all it has

# Pet's settings were chosen on the training third of its sample (docs/results.md), where images are scaled to 512.
PET = {"data_root": DATA_ROOTS["pet"], "max_size": 512}
VOC = {"data_root": DATA_ROOTS["voc"], "max_size": 1024}
COCO = {"data_root": DATA_ROOTS["coco"], "max_size": 1024}
# IRN's classifier and PSA's AffinityNet, learning rates a tenth of theirs as momentum is true here (docs/published.md).
CLASSIFIER = {"method": "cam", "batch_size": 16, "epochs": 5, "lr": 0.01, "head_lr": 10.0, "weight_decay": 1e-4,
              "crop_size": 448, "scales": (0.5, 1.0, 1.5, 2.0)}
AFFINITY = {"batch_size": 8, "epochs": 8, "lr": 0.01, "weight_decay": 5e-4, "alpha_low": 4.0, "alpha_high": 24.0,
            "crf_preset": "psa"}
WALK = {"bg_alpha": 16.0, "beta": 8.0, "walk_steps": 256, "crf_preset": "psa"}


def by_dataset(**added):
    """{dataset: {flag: default}} of one step: where the data is, and `added` for VOC and COCO."""
    return {"pet": PET, "voc": {**VOC, **added}, "coco": {**COCO, **added},
            "folder": {"data_root": DATA_ROOTS["folder"], "max_size": 1024}}


STAGE1, STAGE2, MASKS, DEEPLAB = by_dataset(**CLASSIFIER), by_dataset(**AFFINITY), by_dataset(**WALK), by_dataset()

# What each of DeepLab's heads was published with (recipes: SEAM's segmentation code; MCTformer, whose optimiser has in
# effect neither momentum nor weight decay). Defaults of steps 5 and 6.
DEEPLAB_TRAINING = {
    "seamv1": {"lr": 0.001, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 10, "epochs": 20, "crop_size": 448},
    "mctformer": {"lr": 0.0007, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 4, "epochs": 30, "crop_size": 321}}
DEEPLAB_TEST = {
    "seamv1": {"scales": (0.5, 0.75, 1.0, 1.25, 1.5), "flip": True, "merge": "mean", "crf_preset": "seamv1"},
    "mctformer": {"scales": (0.5, 0.75, 1.0, 1.25, 1.5), "flip": False, "merge": "max", "crf_preset": "mctformer"}}
