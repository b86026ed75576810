"""DPO in a plain PyTorch loop: packed batches, the prompt once, no logits.

python examples/plain_loop.py --model MODEL --pairs pairs.jsonl
"""

import argparse

import torch

import prefalign
from prefalign.data import load_preferences
from prefalign.models import load_model, load_tokenizer, response_token_logps
from prefalign.tokenization import groups_from_pairs, tokenize_preferences

parser = argparse.ArgumentParser(description="DPO in a plain PyTorch loop")
parser.add_argument("--model", required=True)
parser.add_argument("--pairs", required=True, help="rows of prompt, chosen, rejected")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch_size", type=int, default=8)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
policy = load_model(args.model, device=device).train()
reference = load_model(args.model, device=device).requires_grad_(False)
rows = tokenize_preferences(
    load_preferences(args.pairs),
    load_tokenizer(args.model),
    max_length=1024,
    max_prompt_length=512,
    source=args.pairs,
)
pairs = list(groups_from_pairs(rows))  # each a prompt and two responses, chosen first
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)


def response_logps(model, batch):
    """Return the log-prob of each response, [2 * batch_size]."""
    logps = response_token_logps(model, batch)  # hidden states times the head, no logits
    return prefalign.sequence_logps(logps, cu_seqlens=batch.cu_targets).sums


for step in range(args.steps):
    drawn = torch.randperm(len(pairs))[: args.batch_size]
    batch = prefalign.pack([pairs[i] for i in drawn], share_prompts=True).to(device)
    with torch.no_grad():
        ref = response_logps(reference, batch)
    logps = response_logps(policy, batch)
    loss = prefalign.preference_loss(logps[::2], logps[1::2], ref[::2], ref[1::2]).losses.mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
