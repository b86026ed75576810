"""Turn WordNet 3.0's data files into the demo's text: definitions to learn, prompts kept apart.

A row is a synset's single lower-case word and its gloss: ``define harbor (noun):`` is answered by
`` a sheltered port where ships can take on or discharge cargo``, followed by
``; "the ships in the harbor"`` where WordNet quotes a usage example. Synsets without an example
outnumber the others; they are thinned by hash until the two kinds are equally many.

Splits are made by prompt, in the order of its SHA-256: the first go to evaluation, the next to the
seed labels, the next to SPA's iterations, and only what is left is trained on. All senses of a word
share a prompt, so no split has seen another's word with the same part of speech.

    python examples/demo/build_corpus.py [--wordnet /usr/share/wordnet]
"""

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
SPLITS = {"eval": 256, "seed": 512, "iteration": 3072}

# Short answers keep the demo short: nearly all fit in 40 tokens with their example.
MAX_DEFINITION = 90
MAX_EXAMPLE = 70


def digest(text: str) -> str:
    """SHA-256 of the text, the source of every choice made here."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_synsets(path: Path) -> Iterator[tuple[list[str], str]]:
    """Yield (words, gloss) of each synset in a WordNet ``data.*`` file."""
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("  "):  # the licence, at the top of every file
            continue
        fields, gloss = line.split(" | ", 1)
        fields = fields.split()
        count = int(fields[3], 16)
        words = [re.sub(r"\(.*\)$", "", word) for word in fields[4 : 4 + 2 * count : 2]]
        yield words, gloss.strip()


def parse_gloss(gloss: str) -> tuple[str, list[str]]:
    """Split a gloss into its definition and its quoted examples."""
    definition = gloss.split('"', 1)[0].strip(" ;:,-")
    examples = re.findall(r'"([^"]*)"', gloss) if gloss.count('"') % 2 == 0 else []
    return definition, [example.strip() for example in examples]


def make_rows(words: list[str], gloss: str, part: str) -> list[dict[str, str]]:
    """The {prompt, completion} rows of one synset: one per usable example, or one without."""
    words = [word for word in words if re.fullmatch(r"[a-z]{3,14}", word)]
    definition, examples = parse_gloss(gloss)
    if not words or not 8 <= len(definition) <= MAX_DEFINITION or definition[0] == "(":
        return []
    examples = [e for e in examples if len(e) <= MAX_EXAMPLE and len(e.split()) >= 3]
    # Of a synset's words, the one that an example uses: otherwise use of the word is noise.
    pairs: list[tuple[str, str | None]] = [
        (word, example)
        for example in examples
        for word in words
        if re.search(rf"\b{word[:-1]}", example.lower())
    ]
    if not pairs:
        pairs = [(words[0], examples[0] if examples else None)]
    return [
        {
            "prompt": f"define {word} ({part}):",
            "completion": f" {definition}" + (f'; "{example}"' if example else ""),
        }
        for word, example in pairs
    ]


def build(wordnet: Path) -> tuple[list[dict[str, str]], dict[str, list[dict[str, str]]]]:
    """All rows to train on, and the prompts of each split."""
    rows: dict[str, dict[str, str]] = {}
    for suffix, part in PARTS.items():
        for words, gloss in read_synsets(wordnet / f"data.{suffix}"):
            for row in make_rows(words, gloss, part):
                rows[digest(row["prompt"] + row["completion"])] = row
    ordered = [rows[key] for key in sorted(rows)]
    quoted = [row for row in ordered if row["completion"].endswith('"')]
    plain = [row for row in ordered if not row["completion"].endswith('"')]
    kept = quoted + plain[: len(quoted)]

    prompts = sorted({row["prompt"] for row in kept}, key=digest)
    splits, start = {}, 0
    for name, size in SPLITS.items():
        splits[name] = [{"prompt": prompt} for prompt in prompts[start : start + size]]
        start += size
    held_out = set(prompts[:start])
    train = [row for row in kept if row["prompt"] not in held_out]
    train.sort(key=lambda row: (row["prompt"], row["completion"]))
    return train, splits


def to_lines(rows: list[dict[str, str]]) -> bytes:
    """JSON lines, UTF-8."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--out", type=Path, default=HERE / "data")
    args = parser.parse_args()
    train, splits = build(args.wordnet)
    args.out.mkdir(parents=True, exist_ok=True)
    # No time stamp in the archive: the same text gives the same bytes.
    glosses = args.out / "glosses.jsonl.gz"
    glosses.write_bytes(gzip.compress(to_lines(train), compresslevel=9, mtime=0))
    for name, rows in splits.items():
        (args.out / f"{name}_prompts.jsonl").write_bytes(to_lines(rows))
    quoted = sum(row["completion"].endswith('"') for row in train)
    print(f"{glosses.name}: {len(train)} rows, {quoted} with an example, ", end="")
    print(f"{glosses.stat().st_size / 1e6:.2f} MB")
    print(", ".join(f"{name}: {len(rows)} prompts" for name, rows in splits.items()))


if __name__ == "__main__":
    main()
