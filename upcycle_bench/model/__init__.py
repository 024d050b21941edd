"""The network: dense CLIP, MoE layer, surgery, weights.

A tensor's name ends in its shape: x_TD is [T, D]. The letters of the whole project are B batch, L sequence, T tokens,
D width, H hidden width, E experts, K choices per token, R routed rows, C width of the embeddings. A file names only
those that it adds.
"""
