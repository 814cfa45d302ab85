"""A folder that is written again when what it is made from changes, and never over files of the user's."""
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from utils.errors import UserError
from utils.files import file_hash, read_record, write_json

RECORD = ".export.json"  # hidden, so that nobody reads it as an annotation


def check_folder(home: Path) -> None:
    """UserError if a folder holds files that no export wrote, or written ones that have been changed since.

    Files that were added to an export, as links to photos or the caches of a training, do not count.
    """
    if home.exists() and not home.is_dir():
        raise UserError(f"{home} is a file, where a folder is to be; move it away, or name another --output_dir")
    record, there = _record(home), home.is_dir() and any(home.iterdir())
    if record is None and there:
        raise UserError(f"{home} holds files that no --export wrote; move them away, or name another --output_dir")
    changed = [] if record is None else [path for path in record["files"]
                                         if (home / path).is_file() and not _own(home, path, record)]
    if changed:
        raise UserError(f"{home / changed[0]} was changed since it was exported ({len(changed)} such files); rename "
                        f"{home} to keep it, or leave --export {home.name} out")


def filled(home: Path, made_from: str, write: Callable[[Path], None]) -> bool:
    """Have the files that `write` makes, in an empty folder, in the folder `home`.

    made_from: what decides them; if it is what the record says, and all files are there, nothing is done.
    All files are made before the first is put in its place, each atomically; those of an earlier export that are not
    made any more are deleted.
    Returns whether it wrote.  UserError as `check_folder`, or if a file of the user's is in the way.
    """
    check_folder(home)
    record = _record(home) or {"files": {}}
    if record.get("made_from") == made_from and all((home / path).is_file() for path in record["files"]):
        return False
    home.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=home.parent, prefix=f".{home.name}."))
    try:
        write(temporary)
        made = {path.relative_to(temporary).as_posix(): file_hash(path)
                for path in sorted(temporary.rglob("*")) if path.is_file()}
        in_the_way = [path for path in made if path not in record["files"] and os.path.lexists(home / path)]
        if in_the_way:
            raise UserError(f"{home / in_the_way[0]} is there already and was not written by --export; move it away")
        # What a killed run leaves behind counts as written by it.
        write_json(home / RECORD, {"made_from": None, "files": {**record["files"], **made}, "before": record["files"]})
        for path in made:
            (home / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / path, home / path)
        for path in record["files"].keys() - made.keys():
            (home / path).unlink(missing_ok=True)
        write_json(home / RECORD, {"made_from": made_from, "files": made})
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def _record(home: Path) -> dict | None:
    path = home / RECORD
    return read_record(path, f"rename or delete the folder {home}", {"files": dict}) if path.is_file() else None


def _own(home: Path, path: str, record: Mapping) -> bool:
    return file_hash(home / path) in (record["files"][path], record.get("before", {}).get(path))
