"""DPO in an Accelerate loop: several processes, mixed precision, the same packed batches.

accelerate launch examples/accelerate_loop.py --model MODEL --pairs pairs.jsonl
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import prefalign
from prefalign.data import load_preferences
from prefalign.models import load_model, load_tokenizer, response_token_logps
from prefalign.tokenization import groups_from_pairs, tokenize_preferences

parser = argparse.ArgumentParser(description="DPO in an Accelerate loop")
parser.add_argument("--model", required=True)
parser.add_argument("--pairs", required=True, help="rows of prompt, chosen, rejected")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batch_size", type=int, default=8, help="of each process")
parser.add_argument("--mixed_precision", default="no", choices=("no", "bf16"))
args = parser.parse_args()

accelerator = Accelerator(
    mixed_precision=args.mixed_precision, cpu=not torch.accelerator.is_available()
)
set_seed(0)
policy = load_model(args.model).train()
reference = load_model(args.model, device=accelerator.device).requires_grad_(False)
rows = tokenize_preferences(
    load_preferences(args.pairs),
    load_tokenizer(args.model),
    max_length=1024,
    max_prompt_length=512,
    source=args.pairs,
)
loader = torch.utils.data.DataLoader(
    list(groups_from_pairs(rows)),
    batch_size=args.batch_size,
    shuffle=True,
    drop_last=True,
    collate_fn=lambda groups: prefalign.pack(groups, share_prompts=True),
)
policy, optimizer, loader = accelerator.prepare(
    policy, torch.optim.AdamW(policy.parameters(), lr=1e-5), loader
)


def response_logps(model, batch, *, through_wrapper):
    """Return the log-prob of each response; gradients are averaged through the wrapper."""
    logps = response_token_logps(model, batch, through_wrapper=through_wrapper)
    return prefalign.sequence_logps(logps, cu_seqlens=batch.cu_targets).sums


for _ in range(args.epochs):
    for batch in loader:
        batch = batch.to(accelerator.device)
        with accelerator.autocast():  # the head and the reference too, not the model alone
            with torch.no_grad():
                ref = response_logps(reference, batch, through_wrapper=False)
            logps = response_logps(policy, batch, through_wrapper=True)
            out = prefalign.preference_loss(logps[::2], logps[1::2], ref[::2], ref[1::2])
        accelerator.backward(out.losses.mean())
        optimizer.step()
        optimizer.zero_grad()
        loss = accelerator.reduce(out.losses.mean().detach(), "mean")
        accelerator.print(f"loss {loss.item():.4f}")
# Gloo aborts now and then at exit where DDP's model outlives its process group.
del out, logps, ref, loss
accelerator.wait_for_everyone()
policy, optimizer, loader = accelerator.free_memory(policy, optimizer, loader)
accelerator.end_training()
