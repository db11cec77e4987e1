"""What was tried to make a step cheaper, with the gain expected on paper and measured."""

from __future__ import annotations

NOTES = """What a step leaves out or does differently. Expected: share of the FLOPs that are left (shapes cpu /
llava-1.5-7b, lengths of the mix), which is what the step would cost more without it.

kept
  text before the image computed once for a run       5 % / 17 %
  frozen layers: text's queries and FFN only          5 % / 15 %
  last layer and logits at supervised positions       7 % /  5 %
  no backward pass for rows without an image          8 % / 18 %   6.1 % of the rows, but the longest ones
  the tower's blocks after the selected one           3 % /  0.3 %
  packed tokens: no padding outside attention         the share that the benchmark prints; grouping by length is in
                                                      data/batching.py, which the plain side is given too
  features of data.cache_features                     69 % / 7 % of the step is the tower
  a norm and a gated FFN that keep their inputs only  no FLOPs: 4h + 2m of 12h + 6m bytes per token and layer (bf16)
  rows filled without autograd's index_copy_          no FLOPs: it kept rotated queries, keys and values twice
  one additive mask for all layers                    SDPA made one of a bool mask in every layer, and kept it
  loss and gradient of the logits in one pass         no FLOPs: logits live for 2^25 values at a time

not done, on paper
  keys and values of a run of frozen layers at once   no FLOPs; a second copy of 2h^2 weights per layer (1.3 GB at 7B)
                                                      to make products larger that are large enough
  the selected block's second FFN matrix on merged    1.3 % of the tower, and the rounding of VisionZip's tokens moves
    tokens only (the mean goes through a matrix)
  layer 0's query, key and value gradients of text    0.4 % / 0.2 %
  attention of rows without their padding             attention is 4 % of a layer at these lengths

tried and not kept
  quick_gelu in place in the tower: bit for bit equal; expected 5 % of the tower (15 of 30 ms a block for two images),
    3.5 % of the step in shape cpu. Measured, CPU time in turns: tower 3.00 s before, 3.04 after, step 4.73 and 4.59
    (1 sample, 3 rounds, other users): within the noise. The tower's tensors: 36 MiB before, 27 after.
  torch.compile of the tower's blocks (inductor, static shapes): expected 10 % of the tower at most, for matrix
    products alone are 81 % of it (1.26 of 1.56 s for four blocks and two images) and attention 9 %. Measured, CPU
    time in turns: 7 % of the tower (1.46 s), 4.6 % of the step in shape cpu, none with cached features; outputs move
    by 1e-6, which the identity of cached features would have to know, and compiling four blocks took 43 s.
  kernels that fuse norms, gates and additions in the language model: expected 6 % at most on a CPU, for of the
    cached step in shape cpu (torch.profiler, 4 samples) matrix products are 86 %, attention 8 %, all else 6 %: the
    gated FFN 2 %, norms 1 %, rotation, copies and the rest 3 %.
  tokens kept from the first count of a row instead of tokenizing it again: expected nothing where data workers do
    it. A cached row costs 1.3 ms of CPU for its tokens and 0.4 ms for its features: 0.2 of a core at 100 samples/s.

not tried, on paper
  the scores' queries and keys in the tower's own precision: on a card that takes bfloat16 ten times as fast as
    float32, 3 % of the tower, 0.2 % of the step at 7B; patches would be chosen by rounding
  one pass for an image that a global batch holds twice: images of a tenth repeat seldom within 128 rows
  the selected block's keys from the block itself where it is in float32: 0.4 % of the tower

measured on two cores that nothing else used, all of "kept" together, against plain, recomputed; plain; zip
  demo, 16 samples, one thread, median of 5           2.67, 2.17 and 1.35 times as fast; FLOPs promise 2.79, 2.08,
                                                      1.29; tensors' peak 64 MiB against 63, 206 and 139
  cpu, 4 samples, two threads, 2 rounds               3.06, 2.83 and 1.21 times as fast; FLOPs promise 3.10, 2.42,
                                                      1.17; tensors' peak 438 MiB against 1308, 3891 and 1161
  tower and VisionZip, demo                           1.16 times as fast as the whole tower; FLOPs promise 1.25
What limits the step now: the tower, most of the time in shape cpu (11.7 s a step, 3.3 s with cached features); at 7B
the plain layers' matrices.

a trap: gradient_checkpointing_enable has the embeddings' outputs require a gradient, those of the tower too, and
gradient_checkpointing_disable leaves it so. Tower activations were kept and a backward pass run through the tower, on
the plain sides of this benchmark and in runs that recomputed layers. Earlier figures (2.97, 2.44, 1.65 for demo; 4.27,
4.26, 1.32 for cpu) were measured against that; train/objective.recompute_layers takes it back, on all sides.

One by one: --parts '["savings"]' (scripts/benchmarks/savings.py), which takes the step without each of them.
torch.compile of the loss module (dynamic shapes, torch 2.13, CPU) ends in an assertion of dynamo's own, over the
autograd functions that keep less: not used. not measured: flash and varlen attention, Liger's kernels.
"""
