"""Sample pairs of responses from the SFT model and let the annotator label them.

Writes ``data/seed_pairs.jsonl``, the few human labels that SPA starts from (48 to train on, the
rest for the gauge to hold out), and ``data/all_pairs.jsonl``, labels on every iteration prompt for
the "DPO on all labels" arm. Ties are skipped, as an annotator without a preference would.

    python examples/demo/make_pairs.py              # about a minute
"""

import argparse
import json
from pathlib import Path

from evaluate import HERE, load, read_rows, sample
from gold import annotate

SEED_ROWS = 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    for source, target, limit in (
        ("seed_prompts.jsonl", "seed_pairs.jsonl", SEED_ROWS),
        ("iteration_prompts.jsonl", "all_pairs.jsonl", None),
    ):
        prompts = [row["prompt"] for row in read_rows(args.data / source)]
        responses, _ = sample(
            model, tokenizer, prompts, temperature=args.temperature, seed=args.seed
        )
        rows = annotate(prompts, responses)
        print(f"{target}: {len(prompts)} prompts, {len(rows)} labelled, ", end="")
        print(f"{1 - len(rows) / len(prompts):.1%} ties")
        rows = rows[:limit]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.data / target).write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
