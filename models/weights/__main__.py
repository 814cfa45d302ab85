"""Say what a file of weights holds, or write one of its networks under published names.

    python -m models.weights FILE                       say what it is
    python -m models.weights FILE --export psa OUT      write it under published names
"""
import argparse
from collections.abc import Sequence
from pathlib import Path

from models.weights import describe, export, open_weights, summary
from models.weights.published import EXPORTS
from models.weights.records import KINDS
from utils.checkpoint import save_tensors
from utils.errors import UserError
from utils.runtime import run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Describe a file of weights, and export it if asked.  Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m models.weights", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="any file of weights")
    parser.add_argument("--export", nargs=2, metavar=("FAMILY", "OUT"),
                        help=f"write it to OUT under the names of {', '.join(EXPORTS)}")
    parser.add_argument("--network", choices=KINDS,
                        help="which network of the file to export (default: the one its step trained)")
    args = parser.parse_args(argv)
    if args.export and args.export[0] not in EXPORTS:
        parser.error(f"--export {args.export[0]}: choose from {', '.join(EXPORTS)}")
    weights = open_weights(args.file)
    print(describe(weights))
    if args.export:
        family, out = args.export
        if Path(out).exists():
            raise UserError(f"{out} is there already; pass another path, or delete it")
        state, left = export(weights, family, args.network)
        save_tensors(out, state)
        print(f"Wrote {out}: {len(state)} tensors under {family}'s names"
              + (f"; {len(left)} have none there: {summary(left)}" if left else ""))
    return 0


if __name__ == "__main__":
    run_main(main)
