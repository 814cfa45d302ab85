"""ONNX of DeepLab, of classifiers and of the mixture's maps: equal to PyTorch in onnxruntime, used as OUT.json says."""
import importlib

import numpy as np
import pytest
import torch
from script_runs import picture, read_json

from models import export
from models.export.__main__ import main
from models.weights import build_network, pack
from src.pipeline import DeepLabPipeline, Pipeline
from src.seeds import attach
from src.seeds.mixture import binary_posterior
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.grids import capped_size, grid_size, resize_image, resize_maps, resize_tensor, snapped_size
from utils.images import read_image
from utils.maps import to_mask, with_background
from utils.transforms import Normalise

CLASSES = ["cat", "dog", "cow"]
SMALL = {"backbone": "resnet38", "width": 0.0625, "output_stride": 8, "dilated": True}


def checkpoint(path, kind, step, backbone=SMALL, seed=None, **how):
    """A checkpoint of a network with random weights.  Returns its path."""
    torch.manual_seed(0)
    how = {"kind": kind, **backbone, "classes": len(CLASSES), **how}
    network = build_network(**how)
    if seed is not None:
        attach(network, seed)
        how["seed"] = seed
        for name, tensor in network.seed.named_buffers():
            tensor.normal_(std=0.3 if name == "weight" else 1.0)
    with torch.no_grad():
        for tensor in network.head.parameters():
            tensor.normal_(std=0.3)
    options = {"max_size": 200, "method": None if seed is None else seed["name"]}
    save_checkpoint(path, {"step": step, "options": options, "classes": CLASSES,
                           "networks": {kind: pack(network, **how)}})
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Function: (name, further arguments) -> (checkpoint, ONNX file, its JSON), each made once."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder, found = tmp_path_factory.mktemp("onnx"), {}
    kinds = {"deeplab": ("deeplab", "deeplab", {"head": "mctformer"}),
             "cam": ("classifier", "stage1", {"seed": {"name": "cam"}}),
             "mixture": ("classifier", "stage1", {"seed": {"name": "mixture", "depths": []}})}

    def make(name, *arguments):
        if (name, arguments) not in found:
            kind, step, how = kinds[name]
            path = checkpoint(folder / f"{name}.pth.tar", kind, step, **how)
            out = folder / f"{name}{len(found)}.onnx"
            assert main([str(path), str(out), *arguments]) == 0
            found[name, arguments] = path, out, read_json(out.with_suffix(".json"))
        return found[name, arguments]
    return make


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Images that a test can afford; the first still has grids finer than the 32 cells of the mixture's affinities."""
    monkeypatch.setattr(export, "SIZES", ((265, 281), (97, 65)))


def run(path, **inputs):
    """The outputs of an ONNX file by their names."""
    import onnxruntime
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: np.asarray(value, np.float32) for name, value in inputs.items()})))


def prepared(image, usage):
    """(1, 3, h, w) of a photo, made by what the JSON says."""
    how = usage["preprocessing"]
    size = snapped_size(capped_size(image.shape[:2], how["max_size"]), how["stride"])
    return Normalise(tuple(how["mean"]), tuple(how["std"]))(resize_image(image, size))[None].numpy()


def far(ours, theirs):
    return abs(ours - theirs).max() / np.ptp(theirs)


# --- equal to PyTorch ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["deeplab", "cam", "mixture"])
@pytest.mark.parametrize("size, count", [((33, 33), 1), ((65, 193), 3), ((281, 265), 1)])
def test_onnxruntime_agrees_with_pytorch_at_sizes_and_counts_that_the_export_never_saw(made, name, size, count):
    from models.backbone import for_inference
    from models.weights import load_model, unpack
    path, out, _ = made(name)
    (record,) = load_model(path, None)["networks"].values()
    gap = export.largest_gap(out, export.graph_of(for_inference(unpack(record, attach))), size, count)
    assert gap < export.TOLERANCE, f"{gap:.1e} of the range"


def test_deeplabs_masks_through_onnx_are_those_of_the_pipeline(made, tmp_path):
    path, out, usage = made("deeplab")
    image = read_image(picture(tmp_path / "a.png", 150, 230, file_format="PNG"))
    pipeline = DeepLabPipeline.load(str(path), device="cpu", scales=(1.0,), flip=False)
    logits = torch.from_numpy(run(out, image=prepared(image, usage))["logits"])
    after = usage["postprocessing"]
    found = resize_tensor(logits, grid_size(capped_size(image.shape[:2], usage["preprocessing"]["max_size"]), 8))
    found = found.softmax(dim=after["softmax_axis"])[0].numpy()
    keys = np.flatnonzero(found[1:].max(axis=(1, 2)) > 0.05)
    kept = found[[0, *(keys + 1)]]
    mask = to_mask(resize_maps(kept / kept.sum(axis=0), image.shape[:2]), keys, after["threshold"])
    expected = pipeline.mask(image, crf=None)
    assert (mask != expected).mean() < 1e-3 and len(np.unique(expected)) > 1, f"{(mask != expected).mean():.2%} differ"


@pytest.mark.parametrize("name", ["cam", "mixture"])
@pytest.mark.parametrize("labels", [["dog"], ["cat", "cow"], None])
def test_a_classifiers_maps_through_onnx_are_those_of_the_pipeline(made, tmp_path, name, labels):
    path, out, usage = made(name)
    image = read_image(picture(tmp_path / "a.png", 170, 200, file_format="PNG"))
    expected = Pipeline.load(str(path), device="cpu", scales=(1.0,), flip=False).cam(image, labels)
    known = [[float(label in (labels or ())) for label in CLASSES]]
    found = run(out, image=prepared(image, usage), **({"labels": known} if name == "mixture" else {}))
    grid = tuple(-(-side // 4) for side in capped_size(image.shape[:2], usage["preprocessing"]["max_size"]))
    maps = found["maps"] if name == "mixture" else np.maximum(found["cam"], 0)
    maps = resize_tensor(torch.from_numpy(maps[:, expected.keys]), grid)[0].numpy()
    maps = maps ** usage["postprocessing"].get("sharpness", 1)
    maps /= np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-8)
    assert far(maps, expected.maps) < export.TOLERANCE, f"{far(maps, expected.maps):.1e}"
    if name == "mixture":
        others = np.setdiff1d(range(len(CLASSES)), expected.keys)
        assert not found["maps"][:, others].any(), "a class that is not shown has a map"
    assert far(found["logits"][0], found["cam"].mean(axis=(2, 3))[0]) < 1e-5
    background = with_background(maps, usage["postprocessing"]["bg_alpha"])[0]
    assert 0 <= background.min() < background.max() <= 1


def test_posteriors_next_to_nothing_keep_their_digits(tmp_path):
    """The mixture stretches a class's posterior to its maximum; onnxruntime's sigmoid is never below 1e-8."""
    pytest.importorskip("onnxruntime")

    class Posterior(torch.nn.Module):
        def forward(self, inner):
            return binary_posterior(inner, torch.zeros_like(inner), torch.full_like(inner, 0.5))
    odds = torch.linspace(-60, 60, 121)[None, None]
    torch.onnx.export(Posterior(), (odds,), str(tmp_path / "a.onnx"), input_names=["inner"], dynamo=False)
    (found,), expected = run(tmp_path / "a.onnx", inner=odds.numpy()).values(), torch.sigmoid(odds).numpy()
    gap = abs(found / expected - 1).max()
    assert gap < 1e-4, f"{gap:.1e} of a posterior"


def test_a_mixtures_maps_can_be_left_out(made):
    _, out, usage = made("mixture", "--no-maps")
    assert [one["name"] for one in usage["inputs"]] == ["image"], usage["inputs"]
    found = run(out, image=np.zeros((1, 3, 65, 65)))
    assert list(found) == ["logits", "cam"] == [one["name"] for one in usage["outputs"]], list(found)
    assert "'mixture', is not in the file" in usage["postprocessing"]["steps"][0], usage["postprocessing"]


def test_a_file_of_fixed_size_takes_that_size_alone(made):
    _, out, usage = made("deeplab", "--size", "97", "65")
    assert usage["inputs"][0]["shape"] == [1, 3, 97, 65] and usage["preprocessing"]["size"] == [97, 65], usage["inputs"]
    assert run(out, image=np.zeros((1, 3, 97, 65)))["logits"].shape == (1, 4, 13, 9)
    with pytest.raises(Exception, match="(?i)dimension"):
        run(out, image=np.zeros((1, 3, 65, 65)))


def test_the_json_names_what_the_file_has(made):
    import onnxruntime
    for name in ("deeplab", "cam", "mixture"):
        _, out, usage = made(name)
        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        for kind, found in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            assert [one["name"] for one in usage[kind]] == [one.name for one in found], f"{name}: {kind}"
            for one, theirs in zip(usage[kind], found):
                sides = [[isinstance(side, int) and side for side in shape] for shape in (one["shape"], theirs.shape)]
                assert sides[0] == sides[1], f"{name}: {one}, but {theirs.shape}"
        assert usage["classes"] == CLASSES and usage["backbone"] == "resnet38", usage


# --- what is refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, missing):
    real = importlib.import_module

    def without(name, *rest):
        if name == missing:
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)
    monkeypatch.setattr(importlib, "import_module", without)
    path = checkpoint(tmp_path / "a.pth.tar", "deeplab", "deeplab")
    with pytest.raises(UserError, match="run: pip install onnx onnxruntime"):
        main([str(path), str(tmp_path / "a.onnx")])
    assert [one.name for one in tmp_path.iterdir()] == ["a.pth.tar"], "something was written"


@pytest.mark.parametrize("there", ["a.onnx", "a.json"])
def test_no_file_is_written_over(tmp_path, there):
    (tmp_path / there).write_text("mine")
    path = checkpoint(tmp_path / "a.pth.tar", "deeplab", "deeplab")
    with pytest.raises(UserError, match=f"{there} is there already; pass another path"):
        main([str(path), str(tmp_path / "a.onnx")])
    assert (tmp_path / there).read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_a_size_that_is_no_multiple_of_the_stride_plus_1_is_refused_with_the_nearest(tmp_path):
    pytest.importorskip("onnxruntime")
    path = checkpoint(tmp_path / "a.pth.tar", "deeplab", "deeplab")
    with pytest.raises(UserError, match=r"--size 96 64: .* k \* 8 \+ 1 pixels a side, .* pass --size 97 65"):
        main([str(path), str(tmp_path / "a.onnx"), "--size", "96", "64"])


def test_a_checkpoint_of_affinities_alone_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "a.pth.tar"
    how = {"kind": "affinity", **SMALL, "classes": 3}
    save_checkpoint(path, {"step": "stage2", "options": {}, "classes": CLASSES,
                           "networks": {"affinity": pack(build_network(**how), **how)}})
    with pytest.raises(UserError, match="no DeepLab and no classifier, but affinity"):
        main([str(path), str(tmp_path / "a.onnx")])


def test_a_graph_that_differs_is_not_kept(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    path = checkpoint(tmp_path / "a.pth.tar", "deeplab", "deeplab")
    monkeypatch.setattr(export, "TOLERANCE", 0.0)
    with pytest.raises(UserError, match="onnxruntime differs from PyTorch by .* of an output's range at 265 x 281"):
        main([str(path), str(tmp_path / "a.onnx")])
    assert [one.name for one in tmp_path.iterdir()] == ["a.pth.tar"], "something was written"


def test_a_network_that_onnx_has_no_operations_for_is_refused_in_one_line(tmp_path, capfd):
    pytest.importorskip("onnxruntime")

    class Odd(torch.nn.Module):
        inputs, outputs = ("image",), ("logits",)

        def forward(self, image):
            return (torch.linalg.inv(image[..., :3, :3]),)
    with pytest.raises(UserError, match="cannot be exported to ONNX .*linalg_inv") as caught:
        export.write_onnx(tmp_path / "a.onnx", Odd(), None)
    assert "\n" not in str(caught.value) and "graph(" not in capfd.readouterr().out
