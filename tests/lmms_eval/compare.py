"""Holds what lmms-eval counted as right against what `qvlm evaluate` did, question by question;
exit status 1 if one of them differs.

python tests/lmms_eval/compare.py SAMPLES.jsonl EVALUATION.json
"""

import json
import sys
from pathlib import Path


def main(samples: str, evaluation: str) -> int:
    lines = [json.loads(line) for line in Path(samples).read_text().splitlines()]
    theirs = {line["doc_id"]: bool(line["exact_match"]) for line in lines}
    said = {line["doc_id"]: line["filtered_resps"] for line in lines}
    ours = dict(
        enumerate(
            question["correct"]
            for question in json.loads(Path(evaluation).read_text())["questions"]
        )
    )
    if theirs.keys() != ours.keys():
        print(f"lmms-eval answered {len(theirs)} questions, qvlm evaluate {len(ours)}")
        return 1
    print(
        f"right: lmms-eval {sum(theirs.values())} of {len(theirs)}, qvlm evaluate "
        f"{sum(ours.values())} of {len(ours)}"
    )
    different = [number for number in ours if ours[number] != theirs[number]]
    for number in different:
        print(
            f"question {number}: lmms-eval {theirs[number]} ({said[number]!r}), qvlm evaluate "
            f"{ours[number]}"
        )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
