"""Floating-point operations of a model, counted in closed form."""

from __future__ import annotations

from transformers import PreTrainedConfig

from models.layers import indexed_layers, linear_attention_layers, ngram_layers, sparse_layers


def training_flops(
    hf_config: PreTrainedConfig,
    tokens: float,
    labels: float,
    squared_lengths: float,
    *,
    front_layers: int = 0,
    frozen: bool = False,
    adapter_parameters: int = 0,
) -> float:
    """Model FLOPs of forward and backward: 2 per multiply-add, backward twice the forward, no recomputation.

    Matrix products count for every token, of a mixture of experts those of the experts it is sent to, the
    router and the shared expert; the head for every label; causal attention for half of each document's square.
    Gated DeltaNet counts its short convolution and, whatever way a kernel computes it, the recurrence
    S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T, o_t = S_t q_t (https://arxiv.org/abs/2412.06464,
    equation 10): three products with a [key width, value width] state per token and value head.
    Qwen4-Exp's hyper-connections and n-grams count their projections and convolution, its indexer, which has no
    backward, its projection and one score for each block of tokens; attention then counts as if all tokens were
    chosen, which is so in documents of up to `indexer_budget` tokens and too much in longer ones.
    The embedding look-up, norms and other elementwise work count nothing.

    Args:
        hf_config: of a family in `models.build.CONFIG_CLASSES`.
        tokens: real tokens, without padding.
        labels: tokens that are predicted; the loss computes logits for no other.
        squared_lengths: sum over documents of their squared length in tokens.
        front_layers: frozen decoder layers before the first trained one, which have no backward.
        frozen: the weights take no gradient, it only passes through them to adapters.
        adapter_parameters: of low-rank adapters.
    """
    linear, sparse = linear_attention_layers(hf_config), sparse_layers(hf_config)
    indexed, ngrams = indexed_layers(hf_config), ngram_layers(hf_config)
    # 2 in forward, 2 for the gradient of what goes in, 2 for that of the weight.
    behind = 4 if frozen else 6
    per_token = 6 * adapter_parameters
    scores = 0.0
    for layer in range(hf_config.num_hidden_layers):
        in_front = layer < front_layers
        if layer in linear:
            products = _linear_attention_products(hf_config)
        else:
            products = _attention_weights(hf_config)
            product = 2 * _query_width(hf_config) * squared_lengths * 0.5
            scores += (2 if in_front else 6) * product
        if layer in indexed:
            width = hf_config.indexer_n_heads * hf_config.indexer_head_dim
            per_token += 2 * hf_config.hidden_size * (width + hf_config.indexer_head_dim)
            blocks = squared_lengths * 0.5 / hf_config.indexer_compress_ratio
            scores += 2 * width * blocks
        if layer in ngrams:
            projections, convolution = _ngram_products(hf_config)
            # Embeddings that are frozen need no gradient.
            per_token += (2 if in_front or frozen else 6) * projections
            products += convolution
        products += 2 * _hyper_connection_weights(hf_config, inject=True)
        if layer in sparse:
            products += _expert_weights(hf_config)
        else:
            products += 3 * hf_config.hidden_size * hf_config.intermediate_size
        per_token += (2 if in_front else behind) * products
    per_token += behind * _hyper_connection_weights(hf_config, inject=False)
    # A head that is the embedding is frozen with the layers in front.
    head_frozen = frozen or (front_layers > 0 and hf_config.tie_word_embeddings)
    head = (4 if head_frozen else 6) * labels * hf_config.hidden_size * hf_config.vocab_size
    return tokens * per_token + head + scores


def _query_width(hf_config: PreTrainedConfig) -> int:
    heads = hf_config.num_attention_heads
    return heads * (getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads)


def _attention_weights(hf_config: PreTrainedConfig) -> int:
    """Of the projections to queries, keys and values and of the output; with Gated DeltaNet also of an output gate."""
    query = _query_width(hf_config)
    key_value = query // hf_config.num_attention_heads * hf_config.num_key_value_heads
    gate = query if hasattr(hf_config, "linear_num_key_heads") else 0
    return hf_config.hidden_size * (2 * query + 2 * key_value + gate)


def _hyper_connection_weights(hf_config: PreTrainedConfig, *, inject: bool) -> int:
    """Of what mixes the streams of a residual into one, and with `inject` weighs what goes back into each; 0 without streams."""
    streams = getattr(hf_config, "hc_count", 0)
    if not streams:
        return 0
    width = streams * hf_config.hidden_size
    return width * (2 * hf_config.hc_lowrank + (streams if inject else 0))


def _ngram_products(hf_config: PreTrainedConfig) -> tuple[int, int]:
    """Multiply-adds per token: the projections of the embeddings to keys and a value, and the convolution over tokens."""
    width = hf_config.hc_count * hf_config.hidden_size
    projections = hf_config.ple_embed_dim * (width + hf_config.hidden_size)
    return projections, width * hf_config.ple_conv_kernel_size


def _linear_attention_products(hf_config: PreTrainedConfig) -> int:
    """Multiply-adds per token: projections, convolution and the recurrence."""
    heads, width = hf_config.linear_num_value_heads, hf_config.linear_value_head_dim
    key = hf_config.linear_num_key_heads * hf_config.linear_key_head_dim
    value = heads * width
    projections = hf_config.hidden_size * (2 * key + 2 * value + 2 * heads + value)
    convolution = (2 * key + value) * hf_config.linear_conv_kernel_dim
    return projections + convolution + 3 * value * hf_config.linear_key_head_dim


def _expert_weights(hf_config: PreTrainedConfig) -> int:
    """Of the experts one token is sent to, the router, and the shared expert with its gate where there is one."""
    h = hf_config.hidden_size
    chosen = hf_config.num_experts_per_tok * 3 * h * hf_config.moe_intermediate_size
    shared = getattr(hf_config, "shared_expert_intermediate_size", 0)
    return chosen + h * hf_config.num_experts + (3 * h * shared + h if shared else 0)
