"""Checkpoints against what they are to be used with: the classes of a dataset, the CAMs of a folder."""
import hashlib
import json
from collections.abc import Mapping, Sequence

from models.weights import load_model
from utils.datasets.base import Dataset
from utils.errors import UserError
from utils.log import say
from utils.options import NETWORK
from utils.store import read_manifest


def record_hash(record: dict) -> str:
    """First 16 hex digits of the SHA-256 of a network's weights, and of how its seed is built."""
    digest = hashlib.sha256(json.dumps(record.get("seed"), sort_keys=True).encode())
    for name, tensor in sorted(record["state"].items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_classes(dataset: Dataset, classes: Sequence[str], source: str) -> None:
    """UserError unless a checkpoint or folder was made for the classes of the dataset."""
    if list(classes) != list(dataset.classes):
        raise UserError(f"{source} knows {len(classes)} classes ({', '.join(classes[:3])}, ...), but {dataset.root} "
                        f"has {len(dataset.classes)} ({', '.join(dataset.classes[:3])}, ...); pass another --data_root "
                        "or --model_path")


def with_classes(payload: dict, dataset: Dataset, source: str) -> dict:
    """A checkpoint after `check_classes`; a published one knows only how many there are, and takes the dataset's."""
    if payload["classes"] is None:
        (record,) = payload["networks"].values()
        if record["classes"] != len(dataset.classes):
            raise UserError(f"{source} knows {record['classes']} classes, but {dataset.root} has "
                            f"{len(dataset.classes)} ({', '.join(dataset.classes[:3])}, ...); pass another --data_root "
                            "or --model_path")
        payload = {**payload, "classes": list(dataset.classes)}
    check_classes(dataset, payload["classes"], source)
    return payload


def built_with(record: dict, options: Mapping[str, object], path: str) -> dict[str, object]:
    """How a checkpoint's network was built, by flags; UserError if the flags given ask for another network."""
    built = {name: record[name] for name in NETWORK if name in record}
    for name, value in built.items():
        if options[name] not in (None, value):
            raise UserError(f"{path} has {name} {value}, not {options[name]}; leave --{name} out")
    return built


def check_same_classifier(classifier: dict, manifest: dict, model_path: str, cam_dir: str) -> None:
    """UserError unless the CAMs of a folder were made by this stage-1 checkpoint, which goes into stage 2's."""
    if record_hash(classifier["networks"]["classifier"]) != manifest["identity"].get("classifier"):
        raise UserError(f"the CAMs in {cam_dir} were not made by {model_path}; run: python run_train.py --stage 1, or "
                        "pass the checkpoint that made them with --model_path")


def open_checkpoint(path: str, cam_dir: str, steps: Sequence[str] = ("stage2",)) -> dict:
    """The checkpoint at `path`, of one of `steps`.

    A published AffinityNet comes without a classifier: it gets the one that made the CAMs in `cam_dir`.
    """
    payload = load_model(path, steps)
    if list(payload["networks"]) == ["affinity"]:
        manifest = read_manifest(cam_dir, "cam")
        source = manifest["options"]["model_path"]
        classifier = load_model(source, ("stage1",))
        check_same_classifier(classifier, manifest, source, cam_dir)
        say(f"Taking the classifier from {source}, which made the CAMs in {cam_dir}")
        payload = {**payload, "classes": classifier["classes"], "options": {**manifest["options"], "cam_dir": cam_dir},
                   "networks": {**payload["networks"], **classifier["networks"]}}
    return payload
