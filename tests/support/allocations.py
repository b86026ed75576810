"""What is asked of the allocator: a test that no logits are made looks at every block."""

import torch


def largest_allocation(work):
    """Run ``work`` and return the bytes of the largest block it asked the allocator for."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    sizes, events = [0], list(profile.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            sizes.append(event.extra_fields.alloc_size)
    return max(sizes)
