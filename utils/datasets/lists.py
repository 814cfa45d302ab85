"""Lists of ids and names in text files, and the files of images that they name."""
import os
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from utils.errors import UserError
from utils.images import SUFFIXES, is_image_name


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


def apart(text: str) -> str:
    """A name in the other spelling (NFD)."""
    return unicodedata.normalize("NFD", text)


def check_ids(ids: Sequence[str], source: Path) -> None:
    """UserError unless each id is the stem of a file of its own: none twice, or in another case, and none a path.

    Masks, CAMs and scores are files named by the id, and some file systems tell no upper from lower case.
    """
    seen = {}
    for image_id in ids:
        if "/" in image_id or "\\" in image_id:
            raise UserError(f"{source} names {image_id!r}, a path; ids are the names of files without folder and "
                            "suffix, all in one folder")
        folded = image_id.casefold()
        if folded in seen:
            raise UserError(f"{source} names {image_id!r} twice; take one out" if seen[folded] == image_id else
                            f"{source} names {seen[folded]!r} and {image_id!r}, whose masks would be one file on some "
                            "systems; rename one")
        seen[folded] = image_id


def check_names(names: Sequence[str], source: Path) -> None:
    """UserError unless the names of classes differ by more than case, and none is the background's."""
    seen = {}
    for name in names:
        if not name or name.strip("_ ").casefold() in ("background", "void", "ignore"):
            raise UserError(f"{source} lists {name!r} as a class; list foreground classes only: in masks, 0 is "
                            "background, 255 ignored, and the first class 1")
        folded = plain(name).casefold()
        if folded in seen:
            raise UserError(f"{source} names the class {name!r} twice; take one out" if seen[folded] == name else
                            f"{source} spells one class {seen[folded]!r} and {name!r}; choose one")
        seen[folded] = name


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
