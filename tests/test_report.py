"""report.html: figures, cards, escaping, streaming and refusals; and the page in a browser, where there is one."""
import base64
import hashlib
import io
import json
import re
import shutil
import time
import tracemalloc
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from report_page import read_report
from script_runs import read_json

from src import gallery
from src.eval import evaluate
from src.masks import MaskConfig, decide
from src.scoring import Stage
from utils import report, thumbnails
from utils.crf import CRF, CRFParams
from utils.datasets.base import Dataset, Pictures
from utils.errors import UserError
from utils.files import load_scores, save_cam, save_scores
from utils.labels import save_mask
from utils.maps import foreground_probability, with_background
from utils.report import Cards, Page, class_colours, hex_colours, write_report

CLASSES = ['</script><script>window.hacked = "class"</script>', '"quoted" & \'single\'', "<img src=x onerror=hacked()>",
           "猫 Käse", "never seen"]
IDS = ["plain", "it's <b>bold & 'q\"", "猫<!--", "portrait", "broken", "nothing"]
SIZES = [(40, 400), (300, 200), (60, 90), (120, 50), (50, 70), (64, 64)]
HOW = MaskConfig(CRF(CRFParams(3, 3, 20, 13, 10, 1), "torch", "cpu"), 64, 0.4)
HEAT = ["#000000"] * thumbnails.LEVELS


def unpacked(layer):
    width, height, text = layer
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(height, width)


def make_split(root):
    """Six images with masks, CAMs and walked scores; the fifth photo is damaged, the last image shows nothing."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number, (image_id, (height, width)) in enumerate(zip(IDS, SIZES)):
        photo = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(photo).save(root / "images" / f"{number}.jpg")
        truth = np.zeros((height, width), np.uint8)
        if image_id != "nothing":
            truth[height // 4:height // 2, width // 4:] = number % 4 + 1
            truth[height // 2] = 255
        save_mask(root / "masks" / f"{image_id}.png", truth)
        keys = [] if image_id == "nothing" else sorted({number % 4, 3})
        grid = ((height + 3) // 4, (width + 3) // 4)
        cam = rng.random((len(keys), *grid)) * (rng.random() < 0.7)
        save_cam(root / "cam", image_id, keys, cam, (height, width))
        save_scores(root / "walk", image_id, keys, with_background(cam ** 2, 3.0), (height, width))
    (root / "images" / "4.jpg").write_bytes((root / "images" / "4.jpg").read_bytes()[:700])
    return Dataset("folder", root, "all", ("all",), CLASSES, IDS, None, root / "images",
                   [f"{number}.jpg" for number in range(len(IDS))], Pictures((root / "masks",), len(CLASSES)))


def record_of(**options):
    return {"options": {"labels": "gt", "bg_threshold": 0.4, "model_path": "output/<i>best", **options},
            "git_commit": "0123456789abcdef", "git_dirty": True, "torch": "2.x", "device_name": "cpu"}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A report of a split with odd names: .dataset, .out, .scores and .page; the photos but the damaged one score."""
    root = tmp_path_factory.mktemp("scored")
    dataset, record = make_split(root / "data"), record_of()
    stages = [Stage("seed", "cam", root / "data/cam", bg_alpha=4.0), Stage("walk", "scores", root / "data/walk")]
    evaluate(dataset.without(["broken"]), [*stages, Stage("mask <b>", "scores", root / "data/walk", crf=True)], HOW, 0,
             root / "out", record["options"], record)
    return SimpleNamespace(dataset=dataset, out=root / "out", scores=read_json(root / "out/scores.json"),
                           page=read_report(root / "out/report.html"))


# --- figures ---------------------------------------------------------------------------------------------------------

def test_the_table_shows_the_figures_of_the_record_and_tells_fixed_from_oracle(scored):
    cells = iter(scored.page.reader.cells)
    for name, row in scored.scores["scores"].items():
        while next(cells) != name:
            pass
        shown = [next(cells) for _ in range(9)]
        fixed = [f"{row['fixed'][key]:.3f}" for key in ("miou", "fg_iou", "image_fg_iou")]
        assert shown[:4] == ["" if name == "central box" else "0.40", *fixed], f"{name}: {shown}, not {fixed}"
        oracle = row.get("oracle")
        expected = [""] * 5
        if oracle:
            best = [f"{oracle[key]:.3f}" for key in ("miou", "fg_iou", "image_fg_iou")]
            expected = ["oracle", f"{oracle['threshold']:.2f}", *best]
        assert shown[4:] == expected, f"{name}: {shown[4:]}, not {expected}"


def test_the_data_of_the_page_equal_the_record(scored):
    data, record = scored.page.data, scored.scores
    assert data["classes"] == ["background", *CLASSES]
    assert [row["name"] for row in data["rows"]] == list(record["scores"]), data["rows"]
    for row in data["rows"]:
        assert row["iou"] == record["scores"][row["name"]]["fixed"]["iou"], f"{row['name']}: {row['iou']}"
        images = {image_id: iou[row["name"]] for image_id, iou in record["image_fg_iou"].items()}
        assert dict(zip(data["images"]["id"], row["images"])) == images, f"{row['name']}: {row['images']}"
        matrix = np.zeros((len(CLASSES) + 1,) * 2, int)
        for i, j, count in row["confusion"]:
            matrix[i, j] = count
        hit = np.diag(matrix)
        with np.errstate(invalid="ignore"):
            iou = hit / (matrix.sum(0) + matrix.sum(1) - hit)
        assert np.allclose(iou, np.array(row["iou"], float), equal_nan=True), f"{row['name']}: {iou}"


def test_the_head_says_what_was_evaluated_and_the_options_are_listed(scored):
    said = " ".join(scored.page.reader.texts)
    for word in ("folder", "all", "known", "output/<i>best", "0123456789 with changes", time.strftime("%Y-")):
        assert word in said, f"{word!r} is not in: {said[:500]}"
    cells = scored.page.reader.cells
    assert cells[cells.index("bg_threshold") + 1] == "0.4", cells[:12]


def test_curves_of_all_swept_stages_are_drawn_with_their_oracles(scored):
    lines = [attributes for tag, attributes in scored.page.reader.tags if tag == "polyline"]
    dots = [attributes for tag, attributes in scored.page.reader.tags if tag == "circle"]
    assert len(lines) == len(dots) == 3, f"{len(lines)} curves, {len(dots)} oracles"
    points = [tuple(map(float, point.split(","))) for point in lines[0]["points"].split()]
    best = min(points, key=lambda point: point[1])  # y grows downwards
    dot = float(dots[0]["cx"]), float(dots[0]["cy"])
    assert dot in points and dot[1] == best[1], f"oracle drawn at {dot}, best point {best}"


# --- cards -----------------------------------------------------------------------------------------------------------

def test_every_image_has_a_card_and_the_worst_come_first(scored):
    images = scored.scores["image_fg_iou"]
    shown = scored.page.data["images"]["id"]
    assert sorted(shown) == sorted(images) and scored.page.count == len(images), f"{shown}"
    iou = [images[image_id]["mask <b>"] for image_id in shown]
    known = [value for value in iou if value is not None]
    assert known == sorted(known) and iou == known + [None] * (len(iou) - len(known)) and None in iou, f"{iou}"


def test_the_layers_are_what_the_stages_made_of_each_image(scored):
    kinds = [layer["kind"] for layer in scored.page.data["layers"]]
    assert kinds == ["heat", "heat", "mask", "truth"], kinds
    dataset, root = scored.dataset, scored.dataset.root
    for index, image_id in enumerate(dataset.ids):
        if image_id == "broken":
            continue
        card, size = scored.page.cards[image_id], SIZES[index]
        seed, walk, mask, truth = map(unpacked, card["layers"])
        rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for old, new in zip(size, truth.shape))
        assert card["size"] == list(size) and max(truth.shape) == min(192, max(size)), f"{image_id}: {truth.shape}"
        assert (truth == dataset.mask(index)[np.ix_(rows, columns)]).all(), f"{image_id}: other ground truth"
        keys, probabilities = load_scores(root / "walk", image_id)
        image, _ = dataset.photo(index, HOW.max_size)
        made = decide(image, keys, probabilities, HOW.crf, HOW.max_size, HOW.bg_threshold, size)
        assert (mask == made[np.ix_(rows, columns)]).all(), f"{image_id}: other mask"
        assert max(walk.shape) == min(96, max(size)) and seed.shape == walk.shape, f"{walk.shape}"
        coarse, _ = foreground_probability(probabilities, keys)
        gap = abs(walk.mean() / (thumbnails.LEVELS - 1) - coarse.mean())
        assert gap < 0.06, f"{image_id}: the mean of the walk's picture is {gap:.3f} off"
        with Image.open(io.BytesIO(base64.b64decode(card["photo"]))) as photo:
            assert (photo.format, photo.size[::-1]) == ("JPEG", truth.shape), f"{photo.format} {photo.size}"


def test_a_card_names_the_classes_of_its_image_and_their_iou(scored):
    data = scored.page.data["images"]
    place = data["id"].index("plain")
    assert data["truth"][place] == [1] and set(data["found"][place]) <= {1, 4}, f"{data['truth']} {data['found']}"
    assert set(scored.page.cards["plain"]["iou"]) == {str(k) for k in {0, 1, *data["found"][place]}}
    place = data["id"].index("nothing")
    assert data["truth"][place] == data["found"][place] == [], f"{data['truth']} {data['found']}"


def test_masks_are_reported_without_photos_that_cannot_be_decoded_and_without_a_sweep(scored, tmp_path):
    record = record_of(mask_dir="masks")
    masks = tmp_path / "masks"
    for index, image_id in enumerate(IDS):
        truth = scored.dataset.mask(index)
        save_mask(masks / f"{image_id}.png", np.where(truth == 255, 0, truth))
    dataset = scored.dataset.subset([4, 5])
    counted = evaluate_masks(dataset, masks, tmp_path / "out", record)
    page = read_report(tmp_path / "out/report.html")
    assert page.cards["broken"]["photo"] is None and page.cards["nothing"]["photo"], "the damaged photo"
    assert counted["masks"]["fixed"]["miou"] == 1 and page.data["rows"][-1]["iou"][:2] == [1.0, 1.0], page.data["rows"]
    assert not [tag for tag, _ in page.reader.tags if tag == "polyline"], "curves without a sweep"


def evaluate_masks(dataset, masks, out, record):
    """`evaluate`, without the panels, which need every photo."""
    from src.eval import report as write_scores
    from src.scoring import score_split
    stages, how = [Stage("masks", "mask", masks)], MaskConfig(None, 64, 0.4)
    with gallery.cards_in(out, dataset) as cards:
        tallies = score_split(dataset, stages, how, 0, cards)
        table = write_scores(dataset, tallies, record["options"], out)
        gallery.gather(cards, dataset)
        rows = gallery.rows_of(stages, how, tallies, table)
        gallery.write(out, dataset, cards, record, stages, rows, tallies)
    return table


def test_a_split_without_ground_truth_gets_a_gallery_without_scores(scored, tmp_path):
    dataset = scored.dataset.without(["broken"])
    for index, image_id in enumerate(dataset.ids):
        save_mask(tmp_path / "masks" / f"{image_id}.png", np.full(dataset.size(index), index % 2 * 3, np.uint8))
    gallery.write_unscored(tmp_path, dataset, dataset.root / "walk", tmp_path / "masks", 0, record_of(labels=None))
    page = read_report(tmp_path / "report.html")
    assert page.data["rows"] == [] and page.data["images"]["id"] == dataset.ids, page.data["images"]
    assert page.data["images"]["truth"] == [None] * 5 and page.data["images"]["found"] == [[], [3], [], [3], []]
    assert [len(card["layers"]) for card in page.cards.values()] == [2] * 5 and set(page.data["colours"]) == {"3"}
    hidden = [attributes for tag, attributes in page.reader.tags if attributes.get("class") == "pair"]
    assert len(hidden) == 2 and all("hidden" in attributes for attributes in hidden), f"{hidden}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks", "report.html"]


def test_a_gallery_of_a_larger_split_is_a_sample_that_says_so(scored, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "LARGEST", 2)
    masks = scored.dataset.root / "masks"
    # Ground truth is no mask; nothing is left behind.
    with pytest.raises(UserError, match=r"holds pixels of no class \(255\)"):
        evaluate_masks(scored.dataset, masks, tmp_path / "bad", record_of(mask_dir="masks"))
    for index, image_id in enumerate(IDS):
        save_mask(tmp_path / "masks" / f"{image_id}.png", np.zeros(scored.dataset.size(index), np.uint8))
    evaluate_masks(scored.dataset, tmp_path / "masks", tmp_path / "out", record_of(mask_dir="masks"))
    page = read_report(tmp_path / "out/report.html")
    assert sorted(page.data["images"]["id"]) == sorted([IDS[0], IDS[-1]]), page.data["images"]
    assert page.data["split"] == 6 and page.count == 2, f"{page.count} of {page.data['split']}"


# --- escaping, and no network ----------------------------------------------------------------------------------------

def test_no_name_becomes_markup_and_every_name_survives(scored):
    text = (scored.out / "report.html").read_text(encoding="utf-8")
    scripts = [attributes for tag, attributes in scored.page.reader.tags if tag == "script"]
    assert len(scripts) == 3, f"{len(scripts)} script elements: {scripts}"  # data, the script, one block of cards
    allowed = {"html", "head", "meta", "title", "style", "body", "a", "header", "h1", "h2", "dl", "div", "dt", "dd",
               "td", "details", "summary", "table", "tbody", "tr", "th", "noscript", "p", "main", "section", "thead",
               "svg", "text", "line", "polyline", "circle", "ul", "li", "small", "label", "select", "span", "button",
               "ol", "canvas", "input", "dialog", "script"}
    found = {tag for tag, _ in scored.page.reader.tags}
    assert found <= allowed, f"elements {found - allowed}"
    assert not [name for _, attributes in scored.page.reader.tags for name in attributes if name.startswith("on")]
    assert scored.page.data["classes"][1:] == CLASSES and set(scored.page.data["images"]["id"]) == set(IDS) - {"broken"}
    assert "<!--" not in text.split("<body>")[1], "a comment"


def test_bytes_of_a_path_that_are_no_text_do_not_stop_the_report(tmp_path):
    page = Page("a\udcff<b>", {"root": "\udcff"}, {"path": "\udcff"}, ["\udcff"], [], [], {}, 0, HEAT)
    write_report(tmp_path / "report.html", page, [])
    assert "<b>" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_asks_for_nothing_and_its_policy_allows_its_own_code_only(scored):
    text = (scored.out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?[^"'#]|url\(|@import|https?:""", text.split('id="data"')[0]), "an address"
    (policy,) = [attributes["content"] for tag, attributes in scored.page.reader.tags
                 if attributes.get("http-equiv") == "Content-Security-Policy"]
    for element in ("style", "script"):
        code = re.search(rf"<{element}>(.*?)</{element}>", text, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy, f"{element}: {policy}"
    assert policy.startswith("default-src 'none'; img-src blob:;"), policy


# --- streaming, refusals ---------------------------------------------------------------------------------------------

def card(size=10):
    return {"photo": "A" * size, "layers": [], "size": [1, 1], "iou": {}, "truth": None, "found": [1]}


def page_of(ids, places):
    return Page("t", {}, {}, ["cat"], [], ids, places, len(ids), HEAT)


def test_cards_come_back_in_any_order_and_their_file_goes_with_the_block(tmp_path):
    with Cards(tmp_path, "abc") as mine, Cards(tmp_path, "abc", shared=True) as other:
        assert not list(tmp_path.iterdir()), "a file before the first card"
        for cards, letters in ((mine, "ab"), (other, "c")):
            for number, letter in enumerate(letters):
                cards.add(letter, {**card(), "photo": letter * (number + 1)})
            cards.flush()
        assert len(list(tmp_path.iterdir())) == 1, "only what others read has a name"
        found = [json.loads(text)["photo"] for text in mine.read([other.places["c"], *map(mine.places.get, "ba")])]
    assert found == ["c", "bb", "a"] and not list(tmp_path.iterdir()), f"{found}, {list(tmp_path.iterdir())}"


def test_cards_are_written_one_by_one(tmp_path):
    ids, size = [str(number) for number in range(300)], 100_000
    with Cards(tmp_path, ids) as cards:
        tracemalloc.start()
        for image_id in ids:
            cards.add(image_id, card(size))
        write_report(tmp_path / "report.html", page_of(ids, cards.places), cards.read(map(cards.places.get, ids)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    written = (tmp_path / "report.html").stat().st_size
    assert written > 300 * size and peak < written / 10, f"{peak / 1e6:.1f} MB of memory for {written / 1e6:.1f} MB"


@pytest.mark.parametrize("failure", [ValueError, OSError, KeyboardInterrupt])
def test_a_report_that_fails_half_way_leaves_the_earlier_one(tmp_path, failure):
    def cards():
        yield json.dumps(card())
        raise failure("half way")
    (tmp_path / "report.html").write_text("earlier")
    places = {name: report.Place(None, 0, 0, None, []) for name in "ab"}
    with pytest.raises(failure, match="half way"):
        write_report(tmp_path / "report.html", page_of("ab", places), cards())
    with pytest.raises(ValueError, match="1 cards for 2 images"):
        write_report(tmp_path / "report.html", page_of("ab", places), [json.dumps(card())])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"], f"{list(tmp_path.iterdir())}"
    assert (tmp_path / "report.html").read_text() == "earlier"


def test_scoring_that_fails_leaves_no_report(scored, tmp_path):
    record = record_of(mask_dir="masks")
    masks = tmp_path / "masks"
    for index, image_id in enumerate(IDS[:2]):
        save_mask(masks / f"{image_id}.png", np.zeros(scored.dataset.size(index), np.uint8))
    (masks / f"{IDS[1]}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot decode"):
        evaluate(scored.dataset.subset([0, 1]), [Stage("masks", "mask", masks)], HOW, 0, tmp_path / "out",
                 record["options"], record)
    assert not list((tmp_path / "out").iterdir()), f"{list((tmp_path / 'out').iterdir())}"


def test_without_the_flag_an_earlier_report_is_left_and_told_of(scored, tmp_path, capsys):
    save_mask(tmp_path / "masks" / "plain.png", np.zeros(SIZES[0], np.uint8))
    gallery.tell_of_earlier(tmp_path)
    assert not capsys.readouterr().err, "there is none"
    (tmp_path / "report.html").write_text("earlier")
    evaluate(scored.dataset.subset([0]), [Stage("masks", "mask", tmp_path / "masks")], HOW, 0, tmp_path,
             {"labels": "gt", "bg_threshold": 0.4})
    assert "report.html is of an earlier run" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "earlier" and (tmp_path / "scores.json").is_file()


def test_colours_of_many_classes_all_differ():
    colours = class_colours(range(1, 255))
    assert len(set(colours.values())) == 254 and all(re.fullmatch("#[0-9a-f]{6}", one) for one in colours.values())
    assert [colours[k] for k in range(1, 4)] == ["#e69f00", "#56b4e9", "#009e73"], "the safest come first"
    with pytest.raises(ValueError, match="32 colours"):
        hex_colours(np.zeros((3, 3), np.uint8))


# --- the scripts -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("step, place", [(4, "eval"), (6, "deeplab_test")])
def test_the_scripts_write_a_report_of_their_split(pipeline, step, place):
    page = read_report(pipeline.folder / "output" / place / "report.html")
    record = read_json(pipeline.folder / "output" / place / "scores.json")
    assert sorted(page.data["images"]["id"]) == sorted(record["image_fg_iou"]) and page.count == record["images"]
    assert f"Wrote output/{place}/report.html" in pipeline.runs[step].stdout, pipeline.runs[step].stdout[-500:]


# --- in a browser ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium, driven by selenium; skipped where either is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip install selenium)")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver on PATH (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "window-size=1200,900",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driver
    driver.quit()


def wait_for(browser, condition, seconds=15):
    """The value of an expression once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := browser.execute_script(f"return {condition}")):
        assert time.monotonic() < deadline, f"still false: {condition}"
        time.sleep(0.05)
    return value


def shown_ids(browser):
    return browser.execute_script("return [...document.querySelectorAll('#grid .line1')].map(e => e.firstChild.title)")


def choose(browser, name, value):
    browser.execute_script("const e = document.getElementById(arguments[0]); e.value = arguments[1];"
                           "(e.onchange || e.oninput)()", name, value)


@pytest.fixture
def opened(browser, scored):
    browser.get((scored.out / "report.html").as_uri())
    browser.execute_script("document.getElementById('gallery').scrollIntoView()")
    wait_for(browser, "performance.getEntriesByName('first picture').length")
    yield browser
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, f"on the console: {errors}"
    assert not browser.execute_script("return window.hacked"), "a name was run as code"


def test_the_page_opens_from_disk_with_its_first_pictures_in_time(opened, scored):
    ids = scored.page.data["images"]["id"]
    assert shown_ids(opened) == ids, f"{shown_ids(opened)}, not {ids}"
    first = opened.execute_script("return performance.getEntriesByName('first picture')[0].startTime")
    assert first < 5000, f"first picture after {first:.0f} ms"
    alts = opened.execute_script("return [...document.querySelectorAll('#grid img')].map(e => e.alt)")
    assert len(alts) == len(ids) and all(image_id in alt for image_id, alt in zip(ids, alts)), alts
    for width in (400, 1600):
        opened.set_window_size(width, 900)
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "mobile": False,
                                                                     "deviceScaleFactor": 1})
        wait_for(opened, f"innerWidth === {width}")
        found = opened.execute_script("return document.documentElement.scrollWidth")
        assert found <= width, f"{found} pixels of content on a page {width} wide"
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_gallery_sorts_filters_and_finds(opened, scored):
    iou = {image_id: row["mask <b>"] for image_id, row in scored.scores["image_fg_iou"].items()}
    choose(opened, "order", "name")
    assert shown_ids(opened) == sorted(iou), shown_ids(opened)
    choose(opened, "order", "best")
    best = shown_ids(opened)
    assert iou[best[0]] == max(value for value in iou.values() if value is not None) and best[-1] == "nothing", best
    choose(opened, "high", "0.0001")
    assert set(shown_ids(opened)) == {name for name, value in iou.items() if value == 0}, shown_ids(opened)
    choose(opened, "high", "1")
    choose(opened, "class", "1")
    data = scored.page.data["images"]
    expected = {name for name, *kinds in zip(data["id"], data["truth"], data["found"]) if 1 in kinds[0] + kinds[1]}
    assert set(shown_ids(opened)) == expected, shown_ids(opened)
    choose(opened, "class", "0")
    choose(opened, "find", "BOLD")
    assert shown_ids(opened) == [IDS[1]], shown_ids(opened)
    assert opened.execute_script("return document.getElementById('count').textContent") == "1 of 5 images"


def test_classes_sort_by_iou_and_by_name_and_filter_the_gallery(opened, scored):
    def names():
        return opened.execute_script("return [...document.querySelectorAll('#bars .name')].map(e => e.textContent)")
    iou = dict(zip(["background", *CLASSES], scored.scores["scores"]["mask <b>"]["fixed"]["iou"]))
    iou = {name: value for name, value in iou.items() if value is not None}
    assert sorted(names()) == sorted(iou) and [iou[name] for name in names()] == sorted(iou.values()), names()
    opened.execute_script("document.getElementById('by-name').click()")
    assert names()[0] == "background" and len(names()) == len(iou), names()
    opened.execute_script("document.querySelectorAll('#bars button')[1].click()")
    assert opened.execute_script("return document.getElementById('class').value") != "0", "no class was chosen"


def test_a_slider_goes_from_photo_to_errors_and_the_pixels_are_the_masks(opened, scored):
    names = opened.execute_script("return [...document.querySelectorAll('#layers button')].map(e => e.textContent)")
    assert names == ["photo", "seed (CAM)", "walk", "mask", "ground truth", "errors"], names
    choose(opened, "find", "plain")
    for step, name in enumerate(names):
        opened.execute_script("const slider = document.querySelector('#grid input'); slider.value = arguments[0];"
                              "slider.oninput()", step)
        wait_for(opened, f"document.querySelector('#grid output').textContent === {json.dumps(name)}")
        canvases = wait_for(opened, f"document.querySelectorAll('#grid canvas').length >= {step}"
                                    " && [...document.querySelectorAll('#grid canvas')].map(c => +c.style.opacity)")
        assert sum(canvases) == (step > 0), f"{name}: opacities {canvases}"
    alpha = opened.execute_script("""
        const canvas = document.querySelector("#grid canvas[data-layer=truth]"), {width, height} = canvas;
        const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
        return Array.from(pixels).filter((_, i) => i % 4 === 3)""")
    truth = unpacked(scored.page.cards["plain"]["layers"][3])
    assert ((np.array(alpha).reshape(truth.shape) > 0) == (truth > 0)).all(), "another picture than the ground truth's"


def test_an_image_is_enlarged_and_the_arrow_keys_go_on(opened, scored):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    ids = scored.page.data["images"]["id"]
    opened.execute_script("document.querySelectorAll('#grid .picture')[1].click()")
    title = "document.getElementById('detail-title').textContent"
    assert wait_for(opened, title) == ids[1]
    ActionChains(opened).send_keys(Keys.ARROW_RIGHT).perform()
    wait_for(opened, f"{title} === {json.dumps(ids[2])}")
    shown = wait_for(opened, "document.querySelectorAll('#large table').length === 2 && "
                             "[...document.querySelectorAll('#large tr')].map(e => e.textContent)")
    iou = scored.scores["image_fg_iou"][ids[2]]["mask <b>"]
    assert f"mask <b>{iou:.3f}" in shown, f"{iou}: {shown}"
    ActionChains(opened).send_keys(Keys.ESCAPE).perform()
    wait_for(opened, "!document.getElementById('detail').open")


def test_the_confusion_matrix_speaks_to_keys(opened):
    from selenium.webdriver.common.keys import Keys
    opened.find_element("id", "matrix").send_keys(Keys.ARROW_RIGHT)
    said = opened.execute_script("return document.getElementById('cell').textContent")
    assert said.startswith("background taken for") and "% of its pixels" in said, said
    assert opened.execute_script("return document.querySelectorAll('#confusions tr').length") > 0
