"""Counts the Python of package and tests: `python tests/size.py`."""

from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
WIDTH, LONG_FILE = 100, 300


def main() -> None:
    folders: Counter[tuple[str, ...]] = Counter()
    files: Counter[tuple[str, ...]] = Counter()
    wide, long = 0, []
    for path in sorted((ROOT / "qvlm_hf").rglob("*.py")) + sorted((ROOT / "tests").rglob("*.py")):
        lines = path.read_text().splitlines()
        inside = path.relative_to(ROOT).parts[:-1]
        for folder in {inside[:depth] for depth in (1, 2, len(inside))}:
            folders[folder] += len(lines)
            files[folder] += 1
        wide += sum(len(line) > WIDTH for line in lines)
        long += [(path.relative_to(ROOT), len(lines))] if len(lines) > LONG_FILE else []
    for folder in sorted(folders):
        print(f"{folders[folder]:7}{files[folder]:5} files  {'/'.join(folder)}")
    print(f"\nlines over {WIDTH} columns: {wide}\nfiles over {LONG_FILE} lines: {len(long)}")
    for name, count in long:
        print(f"{count:7}  {name}")


if __name__ == "__main__":
    main()
