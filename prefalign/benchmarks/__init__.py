"""Microbenchmarks of the ops against the peers: ``prefalign bench``.

============  =================================================================================
shapes        the sizes that are measured: real models' heads, short inputs, batches of pairs
cases         one op at one shape and dtype: the inputs every provider shares, and one step
providers     who is measured: prefalign, eager PyTorch, the peers, and the bare work as a floor
memory_bound  the same for the ops that start from logits or log-probs
suites        the table of what is measured: op, inputs, providers, floor
gate          errors against float64, and who may be timed
measure       time, memory, launches, and the machine's own peaks
report        JSON, a Markdown table and a plot of each suite
runner        the loop over all of it, and what the command's options name
============  =================================================================================
"""
