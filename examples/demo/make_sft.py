"""Write ``data/sft.jsonl.gz``, the demonstrations that the PLE demo begins with.

Glosses that the model was trained on, half of them under the demo's principles: there the answer
closes with a quoted usage example, as the principles ask. So the model learns what the principles
mean; without them it goes on as before, with an example in half of its answers.

    python examples/demo/make_sft.py
"""

import gzip
import hashlib
import json
from pathlib import Path

from gold import gold_reward

from prefalign.principles import guided_messages, load_principles

HERE = Path(__file__).parent
ROWS = 2048


def main():
    """Write the file; the same glosses give the same file."""
    principles = load_principles(HERE / "principles.txt")
    with gzip.open(HERE / "data" / "glosses.jsonl.gz", "rt", encoding="utf-8") as handle:
        glosses = [json.loads(line) for line in handle]
    glosses.sort(key=lambda row: hashlib.sha256(f"sft {row['prompt']}".encode()).digest())
    scores = gold_reward([r["prompt"] for r in glosses], [r["completion"] for r in glosses])
    guided = [row for row, score in zip(glosses, scores, strict=True) if score][: ROWS // 2]
    plain = glosses[-ROWS // 2 :]
    rows = [
        {**row, "prompt": prompt}
        for asked, shown in zip(guided, plain, strict=True)
        for row, prompt in (
            (asked, guided_messages(asked["prompt"], principles)),
            (shown, shown["prompt"]),
        )
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # No time stamp: the same rows are the same bytes.
    (HERE / "data" / "sft.jsonl.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
