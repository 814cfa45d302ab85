"""Feature maps of a split: what a pass keeps, and a second pass from it."""
import copy

import numpy as np
import pytest
import torch
from script_runs import picture

from data.make_toy import make_toy
from models.backbone import for_inference
from models.weights import build_network, pack
from src import features as module
from src.features import Features, Kept
from src.inference import cam_folder, make_cams
from src.pipeline import Pipeline
from src.seeds import attach
from utils.config import DataConfig, Machine, MapConfig, WalkConfig
from utils.datasets import open_dataset
from utils.errors import ImageError, UserError
from utils.files import load_cam
from utils.grids import largest_view
from utils.loader import Views

NAMES = ("layer2", "layer3", "layer4")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    make_toy(folder, train=7, test=1, classes=3, size=64)
    return folder


@pytest.fixture
def split(home):
    return open_dataset(DataConfig("pet", str(home)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_network(kind="classifier", backbone="resnet18", classes=3).eval()


def ids_at(split, *positions):
    return [split.ids[i] for i in positions]


def passes(network, split, kept, second, skip_bad=False):
    """What the second of two passes reads at some positions, as lists; the first is over the whole split."""
    machine = Machine(torch.device("cpu"), skip_bad=skip_bad)
    list(Features(network, split, 96, machine, kept).reader("first")(range(len(split))))
    return list(Features(network, split, 96, machine, kept).reader("second")(second))


def same(one, other):
    return all(torch.equal(a[0][name], b[0][name]) for a, b in zip(one, other) for name in NAMES) and all(
        torch.equal(a[1], b[1]) and np.array_equal(a[2], b[2]) for a, b in zip(one, other))


@pytest.mark.parametrize("room", [0, 3, 7])
def test_a_second_pass_is_the_same_however_much_was_kept(network, split, monkeypatch, room):
    (maps, _, _), *_ = passes(network, split, None, [0])
    monkeypatch.setattr(module, "MEMORY", room * sum(maps[name].nbytes for name in NAMES))
    kept, second = Kept(NAMES, split.ids), [0, 1, 2, 4, 5, 6]
    found = passes(network, split, kept, second)
    assert len(kept.maps) == room, f"{len(kept.maps)} images were kept, there was room for {room}"
    assert len(found) == 6 and same(found, passes(network, split, None, second)), "the passes differ"


def test_what_is_kept_is_not_computed_again(network, split, monkeypatch):
    kept = Kept(NAMES, ids_at(split, 1, 2, 5))
    machine = Machine(torch.device("cpu"))
    list(Features(network, split, 96, machine, kept).reader("first")(range(7)))
    assert list(kept.maps) == ids_at(split, 1, 2, 5), list(kept.maps)
    asked = []
    monkeypatch.setattr(type(split), "photo", lambda self, index, used: asked.append(index) or 1 / 0)
    again = [keys.tolist() for _, _, keys in Features(network, split, 96, machine, kept).reader("second")([1, 2, 5])]
    assert not asked and again == [np.flatnonzero(split.labels[i]).tolist() for i in (1, 2, 5)], (asked, again)


def test_the_second_pass_has_the_cams_of_the_new_head(network, split):
    kept, machine = Kept(NAMES, split.ids), Machine(torch.device("cpu"))
    list(Features(network, split, 96, machine, kept).reader("first")(range(7)))
    other = build_network(kind="classifier", backbone="resnet18", classes=3).eval()
    other.backbone.load_state_dict(network.backbone.state_dict())
    found = list(Features(other, split, 96, machine, kept).reader("second")(range(7)))
    assert same(found, list(Features(other, split, 96, machine).reader("alone")(range(7)))), "not those of the new head"


def test_a_damaged_image_is_left_out_of_both_passes(network, tmp_path):
    make_toy(tmp_path, train=7, test=1, classes=3, size=64)
    split = open_dataset(DataConfig("pet", str(tmp_path)))
    split.image_path(3).write_bytes(b"no image")
    kept = Kept(NAMES, ids_at(split, 1, 3, 6))
    found = passes(network, split, kept, [1, 2, 3, 4, 6], skip_bad=True)
    assert list(kept.maps) == ids_at(split, 1, 6) and len(found) == 4, (list(kept.maps), len(found))
    whole = split.subset([1, 2, 4, 6])
    assert same(found, passes(network, whole, None, range(4))), "others came instead"
    with pytest.raises(ImageError):
        passes(network, split, None, [0])


@pytest.mark.parametrize("scales, alternate, saved", [((1.0, 1.5), True, 3), ((1.5, 1.0), True, 0),
                                                      ((0.5, 1.5), True, 0), ((1.0,), False, 0)])
def test_cams_from_kept_features_have_the_same_bits_and_run_the_backbone_less(split, tmp_path, scales, alternate,
                                                                              saved):
    torch.manual_seed(0)
    own = build_network(kind="classifier", backbone="resnet18", classes=3).eval()
    attach(own, {"name": "cam"})
    machine = Machine(torch.device("cpu"))
    record = pack(own, kind="classifier", backbone="resnet18", classes=3, seed={"name": "cam"})
    payload = {"classes": list(split.classes), "networks": {"classifier": record}}
    runs = {}
    for name, wanted in (("alone", ()), ("kept", ids_at(split, 0, 3, 6))):
        kept = Kept(("layer4",), wanted)
        list(Features(own, split, 96, machine, kept).reader("features")(range(7)))
        pipeline, seen = Pipeline(payload, MapConfig(scales, True, "gt", 96, alternate), WalkConfig(), machine), []
        pipeline.classifier.backbone.register_forward_hook(lambda net, images, maps: seen.append(images[0].shape))
        make_cams(pipeline, split, cam_folder(tmp_path / name, pipeline, False), {"options": {}}, kept=kept)
        runs[name] = seen, [load_cam(tmp_path / name, image_id) for image_id in split.ids]
    (all_passes, alone), (fewer, found) = runs["alone"], runs["kept"]
    assert len(all_passes) - len(fewer) == saved, f"{len(all_passes)} and {len(fewer)} passes"
    assert all(np.array_equal(a, b) for one, other in zip(alone, found) for a, b in zip(one, other)), "other CAMs"
    assert not kept.maps or not saved, f"{len(kept.maps)} are still held"


def test_images_that_go_through_the_network_at_once_have_their_own_features_and_cams(network, split, tmp_path):
    attach(network, {"name": "cam"})
    record = pack(network, kind="classifier", backbone="resnet18", classes=3, seed={"name": "cam"})
    payload = {"classes": list(split.classes), "networks": {"classifier": record}}
    machine = Machine(torch.device("cpu"))
    runs, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            maps = [maps for maps, _, _ in Features(network, split, 96, machine).reader("features")(range(7))]
            pipeline = Pipeline(payload, MapConfig((1.0, 2.0), True, "gt", 96), WalkConfig(), machine)
            make_cams(pipeline, split, cam_folder(tmp_path / str(threads), pipeline, False), {"options": {}})
            assert torch.get_num_threads() == threads, "the number of torch's threads is another afterwards"
        finally:
            torch.set_num_threads(before)
        runs.append((maps, [load_cam(tmp_path / str(threads), image_id)[1] for image_id in split.ids]))
    (alone, cams), (shared, others) = runs
    gap = max((one[name] - other[name]).abs().max().item() for one, other in zip(alone, shared) for name in NAMES)
    assert gap < 1e-4, f"features differ by {gap:.1e}"
    gap = max(np.abs(one - other).max() for one, other in zip(cams, others))
    assert gap < 5e-3, f"CAMs differ by {gap:.1e}"


def test_kept_features_of_a_photo_that_is_decoded_at_half_its_size_are_those_of_the_later_pass(network, tmp_path):
    make_toy(tmp_path, train=2, test=2, classes=2, size=64)
    split = open_dataset(DataConfig("pet", str(tmp_path)))
    picture(split.image_path(0), 300, 420)  # 4.4 times 96: halved for a view of 96 pixels, not for one of 144
    machine, kept = Machine(torch.device("cpu")), Kept(NAMES, split.ids)
    maps = MapConfig((1.0, 1.5), True, "gt", 96, True)
    list(Features(network, split, 96, machine, kept, largest_view(maps.max_size, maps.scales)).reader("first")([0, 1]))
    views = Views(maps.scales, 96, network.backbone.stride, network.backbone.normalise)
    folded = for_inference(copy.deepcopy(network))
    for i, image_id in enumerate(split.ids):
        with torch.no_grad():
            seen = folded.backbone(views(split.photo(i, views.largest)[0])[0][None].to(
                memory_format=torch.channels_last))
        gap = max((seen[name] - kept.maps[image_id][name]).abs().max().item() for name in NAMES)
        assert gap == 0, f"photo {i}: features differ by {gap:.1e}"


def test_a_fit_without_a_single_image_is_refused_in_one_line(network, tmp_path):
    make_toy(tmp_path, train=2, test=2, classes=2, size=64)
    split = open_dataset(DataConfig("pet", str(tmp_path)))
    for i in range(2):
        split.image_path(i).write_bytes(b"no image")
    read = Features(network, split, 96, Machine(torch.device("cpu"), skip_bad=True)).reader("fit")
    with pytest.raises(UserError, match="none of the 2 images of .* that the seed is to be fitted to can be decoded"):
        list(read([0, 1]))


def test_a_mixture_wants_the_images_that_its_fit_reads(network):
    torch.manual_seed(0)
    own = build_network(kind="classifier", backbone="resnet18", classes=3).eval()
    attach(own, {"name": "mixture", "depths": []})
    labels = np.eye(3, dtype=np.uint8)[np.arange(40) % 3]
    asked = []

    def read(positions):
        asked.extend(positions)
        raise InterruptedError
    with pytest.raises(InterruptedError):
        own.seed.fit(own, read, labels, 3)
    assert asked == list(own.seed.wanted(labels, 3)), "it reads others"
    attach(own, {"name": "cam"})
    assert list(own.seed.wanted(labels, 3)) == []
