"""Sample a model on the demo's prompts and say how the annotator likes it.

    python examples/demo/evaluate.py [--model examples/demo/model] [--show 8]

Prints the mean gold reward, the share of each reward, the mean length, the share cut at the length
limit, and the share of prompts where two responses tie. `sample` is also what `make_pairs.py` uses.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from gold import gold_reward
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

HERE = Path(__file__).resolve().parent
MAX_NEW_TOKENS = 48


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(folder: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """The model in float32, the type that CPUs compute in, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[str],
    *,
    count: int = 2,
    temperature: float = 0.7,
    seed: int = 0,
    batch_size: int = 256,
) -> tuple[list[list[str]], list[list[int]]]:
    """Draw `count` responses per prompt.

    Returns:
        The texts, with the space that they begin with, and the lengths in tokens, without EOS;
        both per prompt. A response cut at the limit has `MAX_NEW_TOKENS` tokens.
    """
    torch.manual_seed(seed)
    texts, lengths = [], []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(prompts[start : start + batch_size], padding=True, return_tensors="pt")
        output = model.generate(
            **batch,
            do_sample=True,
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            max_new_tokens=MAX_NEW_TOKENS,
            num_return_sequences=count,
        )[:, batch["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(output, skip_special_tokens=True)
        ends = (output != tokenizer.pad_token_id) & (output != tokenizer.eos_token_id)
        sizes = ends.sum(1).tolist()
        texts += [answers[i : i + count] for i in range(0, len(answers), count)]
        lengths += [sizes[i : i + count] for i in range(0, len(sizes), count)]
    return texts, lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--prompts", type=Path, default=HERE / "data" / "eval_prompts.jsonl")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=8, help="how many answers to print")
    args = parser.parse_args()

    prompts = [row["prompt"] for row in read_rows(args.prompts)]
    responses, lengths = sample(
        *load(args.model), prompts, temperature=args.temperature, seed=args.seed
    )
    rewards = [gold_reward([p] * len(r), r) for p, r in zip(prompts, responses, strict=True)]
    flat = [reward for row in rewards for reward in row]
    sizes = [size for row in lengths for size in row]
    shares = {reward: round(n / len(flat), 3) for reward, n in sorted(Counter(flat).items())}
    for prompt, row in list(zip(prompts, responses, strict=True))[: args.show]:
        print(f"{prompt}{row[0]}")
    print(f"mean gold reward  {sum(flat) / len(flat):.3f}  {shares}")
    print(f"mean length       {sum(sizes) / len(sizes):.1f} tokens")
    print(f"cut at {MAX_NEW_TOKENS} tokens  {sizes.count(MAX_NEW_TOKENS) / len(sizes):.3f}")
    print(f"pairs that tie    {sum(len(set(row)) == 1 for row in rewards) / len(rewards):.3f}")


if __name__ == "__main__":
    main()
