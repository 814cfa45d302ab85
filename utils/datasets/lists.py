"""Lists of ids and names in text files, and the files of images that they name."""
import os
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from utils.errors import UserError
from utils.images import SUFFIXES, is_image_name

LONGEST_ID = 200  # bytes; file systems take names of 255, and results have suffixes and temporary names


def read_lines(path: Path, comment: str = "#") -> list[str]:
    """The lines of a text file without blank ones and those that begin with `comment`.

    UserError if it is missing, no file, or not UTF-8 (a byte-order mark is left out).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        listed = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) if path.parent.is_dir() else ""
        raise UserError(f"no file {path}" + (f"; there is: {listed}" if listed else "; create it")) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8; replace it") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); name a text file") from None
    if "\0" in text:
        raise UserError(f"{path} holds NUL bytes, so that it is no text file in UTF-8; replace it")
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(comment)]


def plain(text: str) -> str:
    """A name in one of its Unicode spellings (NFC): macOS takes names of files apart, CSV files of others do not."""
    return unicodedata.normalize("NFC", text)


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def check_ids(ids: Sequence[str], source: Path) -> None:
    """UserError unless each id is the stem of a file of its own: none twice, in another case, a path, or too long.

    Masks, CAMs and scores are files named by the id, and some file systems tell no upper from lower case.
    """
    path = next((image_id for image_id in ids if "/" in image_id or "\\" in image_id), None)
    if path is not None:
        raise UserError(f"{source} names {path!r}, a path; ids are the names of files without folder and suffix, all "
                        "in one folder")
    long = next((image_id for image_id in ids if len(_bytes(image_id)) > LONGEST_ID), None)
    if long is not None:
        raise UserError(f"{source} names {long[:40]!r}..., of {len(_bytes(long))} bytes; results are named after it, "
                        f"and more than {LONGEST_ID} bytes leave no room for that: shorten it")
    first, second = _alike(ids)
    if first is not None:
        raise UserError(f"{source} names {second!r} twice; take one out" if first == second else
                        f"{source} names {first!r} and {second!r}, whose masks would be one file on some systems; "
                        "rename one")


def check_names(names: Sequence[str], source: Path) -> None:
    """UserError unless the names of classes differ by more than case, and none is the background's."""
    wrong = next((name for name in names if name.strip("_ ").casefold() in ("", "background", "void", "ignore")), None)
    if wrong is not None:
        raise UserError(f"{source} lists {wrong!r} as a class; list foreground classes only: in masks, 0 is "
                        "background, 255 ignored, and the first class 1")
    first, second = _alike(names)
    if first is not None:
        raise UserError(f"{source} names the class {second!r} twice; take one out" if first == second else
                        f"{source} spells one class {first!r} and {second!r}; choose one")


def _alike(names: Iterable[str]) -> tuple[str, str] | tuple[None, None]:
    """The first two names that differ in case and spelling at most; (None, None) if there are none."""
    seen = {}
    for name in names:
        folded = plain(name).casefold()
        if folded in seen:
            return seen[folded], name
        seen[folded] = name
    return None, None


def image_files(folder: Path, ids: Iterable[str]) -> list[str | None]:
    """The name of each id's image in a folder, under a suffix of `SUFFIXES` in any case; None where there is none.

    UserError if the folder is missing, or holds two images of one id.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --data_root should hold {folder.name}/")
    # One listing instead of a look for every id and suffix: on a network disk, seconds instead of minutes.
    there, found = {}, {}
    for name in os.listdir(folder):
        if is_image_name(name):
            stem = plain(os.path.splitext(name)[0])
            if stem in there:
                found.setdefault(stem, {there[stem]}).add(name)
            there[stem] = name
    ids = list(ids)
    both = [image_id for image_id in ids if image_id in found] if found else ()
    if both:
        raise UserError(f"{folder} holds {' and '.join(sorted(found[both[0]]))}, two images of one id"
                        + (f" (and {len(both) - 1} more such pairs)" if len(both) > 1 else "") + "; keep one")
    return [there.get(image_id) for image_id in ids]


def mask_file(folders: Iterable[Path], image_id: str) -> Path | None:
    """The mask <image_id>.png of the first folder that has it, in either of Unicode's spellings; None if none has."""
    names = dict.fromkeys((image_id, unicodedata.normalize("NFD", image_id)))
    paths = (folder / f"{name}.png" for folder in folders for name in names)
    return next((path for path in paths if path.is_file()), None)


def without_mask(folders: Iterable[Path], ids: Iterable[str]) -> list[str]:
    """The ids of which no folder has a mask.  One listing a folder, as in `image_files`."""
    there = {plain(name) for folder in folders if folder.is_dir() for name in os.listdir(folder)}
    return [image_id for image_id in ids if f"{image_id}.png" not in there]


def without_suffix(image_id: str, names: Collection[str]) -> str:
    """An id that was written with its file's suffix, without it.  names: of the files in the folder of images."""
    return os.path.splitext(image_id)[0] if image_id in names and image_id.lower().endswith(SUFFIXES) else image_id


def check_tree(root: Path, parts: Sequence[str], layout: str, nested: Sequence[str] = ()) -> None:
    """UserError, with what was expected and what was found, unless `root` has the folders `parts`.

    nested: folders below `root` where copies of the dataset often begin; one that fits is named as the remedy.
    """
    missing = [part for part in parts if not (root / part).is_dir()]
    if not missing:
        return
    found = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
    shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "") or "nothing"
    inside = next((root / name for name in nested if all((root / name / part).is_dir() for part in parts)), None)
    remedy = f"pass --data_root {inside}" if inside else "pass the folder that holds them as --data_root"
    raise UserError(f"{root} is not {layout}: expected {', '.join(f'{part}/' for part in parts)}, found {shown}; "
                    f"{remedy}")
