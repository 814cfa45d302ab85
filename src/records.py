"""Checkpoints against what they are to be used with: the classes of a dataset, the CAMs of a folder."""
import hashlib
import sys
from pathlib import Path

from models.weights import load_model
from utils.artifacts import read_manifest
from utils.errors import UserError


def record_hash(record):
    """First 16 hex digits of the SHA-256 of a network's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(record["state"].items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_classes(dataset, classes, source):
    """UserError unless a checkpoint or folder was made for the classes of the dataset."""
    if list(classes) != list(dataset.classes):
        raise UserError(f"{source} knows {len(classes)} classes ({', '.join(classes[:3])}, ...), but {dataset.root} "
                        f"has {len(dataset.classes)} ({', '.join(dataset.classes[:3])}, ...); pass another --data_root "
                        "or --model_path")


def settle_classes(payload, dataset, source):
    """As `check_classes` for a checkpoint; a published one knows only how many there are, and takes the dataset's."""
    if payload["classes"] is None:
        (record,) = payload["networks"].values()
        if record["classes"] != len(dataset.classes):
            raise UserError(f"{source} knows {record['classes']} classes, but {dataset.root} has "
                            f"{len(dataset.classes)} ({', '.join(dataset.classes[:3])}, ...); pass another --data_root "
                            "or --model_path")
        payload["classes"] = list(dataset.classes)
    check_classes(dataset, payload["classes"], source)


def check_same_classifier(classifier, manifest, model_path, cam_dir):
    """UserError unless the CAMs of a folder were made by this stage-1 checkpoint, which goes into stage 2's."""
    if record_hash(classifier["networks"]["classifier"]) != manifest["identity"]["classifier"]:
        raise UserError(f"the CAMs in {cam_dir} were not made by {model_path}; run: python run_train.py --stage 1, or "
                        "pass the checkpoint that made them with --model_path")


def open_checkpoint(path, default, cam_dir, steps=("stage2",)):
    """The checkpoint at `path`, of one of `steps`; without one, the newest of stage 2 in output/, the default first.

    A published AffinityNet comes without a classifier: it gets the one that made the CAMs in `cam_dir`.
    Returns (payload, path).
    """
    if path is None:
        found = sorted(Path("output").glob("stage2_*/model_best.pth.tar"), key=lambda p: p.stat().st_mtime)
        path = default if Path(default).is_file() or not found else str(found[-1])
        print(f"Using {path}", file=sys.stderr)
    payload = load_model(path, steps)
    if list(payload["networks"]) == ["affinity"]:
        manifest = read_manifest(cam_dir, "cam")
        source = manifest["options"]["model_path"]
        classifier = load_model(source, ("stage1",))
        check_same_classifier(classifier, manifest, source, cam_dir)
        print(f"Taking the classifier from {source}, which made the CAMs in {cam_dir}", file=sys.stderr)
        payload = {**payload, "classes": classifier["classes"], "options": {**manifest["options"], "cam_dir": cam_dir},
                   "networks": {**payload["networks"], **classifier["networks"]}}
    return payload, str(path)
