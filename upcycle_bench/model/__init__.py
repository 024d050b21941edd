"""The network: dense CLIP, MoE layer, surgery, weights.

Shape suffixes of all files of the project, each of which names only what it adds: B batch, L sequence, T tokens,
D width, H hidden width, E experts, K choices per token, R routed rows, C width of the embeddings.
"""
