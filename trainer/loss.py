"""Losses: `loss_fn(model, batch) -> (loss_sum, metrics)`, a *sum* over valid tokens, and what to log beside it.

The loop divides by the number of valid tokens of the whole step, over all ranks and micro-batches; a mean taken here
would weight a short row like a long one. A loss with the attribute `units` is divided by those (trainer/loop.py). What metrics may be: docs/metrics.md.

Shapes: B rows, S tokens a row, D model width, V vocabulary, N valid tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.hardware import has_bf16_units

IGNORE_INDEX = -100

# fp32 logits that may exist at once. Small enough to stay near the caches of a CPU, large enough that the matrix
# products run at full speed.
CHUNK_BYTES = 128 * 2**20
# On a GPU that share of its memory, if that is more: more rows a product, and still little beside activations.
GPU_SHARE = 1 / 128


def causal_lm_loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the next token, summed over the labels that are not IGNORE_INDEX.

    Args:
        model: called as `model(batch, head)`; `head` gets hidden states [B, S, D] and the head's weight [V, D].
        batch: `labels` [B, S], already shifted: the label at a position is the token that follows it; and
            `label_positions` [N], the places in B * S that have a label.
        z_loss, label_smoothing: see `linear_cross_entropy_sum`; the metric `loss` stays the cross-entropy alone.
    """
    objective, cross_entropy = model(batch, _cross_entropy_head(batch, z_loss, label_smoothing))
    return objective, {"loss": cross_entropy} if z_loss or label_smoothing else {}


def routed_causal_lm_loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    experts_per_token: int,
    aux_loss_coef: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`causal_lm_loss` of a mixture of experts, plus `aux_loss_coef` times the load-balancing loss of its routers.

    The load-balancing loss is taken row by row and weighted by the row's valid tokens, so it is a sum over
    valid tokens like the cross-entropy, and no number of ranks or micro-batches changes it.

    Args:
        model: called as `model(batch, head, router_logits=True)`; returns what `head` returned and a tuple
            of the routers' logits, [B * S, experts] of each layer.
        batch: as for `causal_lm_loss`, and `row_tokens` [B], the real tokens at the start of each row.
        experts_per_token: the experts a token is sent to.
        aux_loss_coef: weight of the load-balancing loss.

    Returns:
        The weighted sum, and the metrics `loss` (the cross-entropy alone), `router_aux_loss` and
        `expert_load` [layers, experts], the real tokens that each expert was sent.
    """
    head = _cross_entropy_head(batch)
    (cross_entropy, _), router_logits = model(batch, head, router_logits=True)
    row_losses, load = load_balancing_loss(router_logits, batch["row_tokens"], experts_per_token)
    auxiliary = (row_losses * (batch["labels"] != IGNORE_INDEX).sum(1)).sum()
    metrics = {"loss": cross_entropy, "router_aux_loss": auxiliary, "expert_load": load}
    return cross_entropy + aux_loss_coef * auxiliary, metrics


def load_balancing_loss(
    router_logits: Sequence[Tensor], row_tokens: Tensor, experts_per_token: int
) -> tuple[Tensor, Tensor]:
    """How unevenly each row's tokens fall on the experts: the auxiliary loss of the Switch Transformer
    (https://arxiv.org/abs/2101.03961, equations 4 to 6) over all layers together, as transformers computes it.

    E experts times the sum over them of the share of tokens sent to one times its mean probability; as many as
    `experts_per_token` where the load is even. Padding counts for nothing.

    Args:
        router_logits: [B * S, E] of each layer.
        row_tokens: [B] int64, the real tokens at the start of each row; 0 for a row of padding, whose loss is 0.
        experts_per_token: the experts with the largest logits, to which a token is sent.

    Returns:
        The loss of each row, [B] fp32, and how many real tokens each expert was sent, [layers, E] fp32.
    """
    rows, experts = len(row_tokens), router_logits[0].shape[1]
    places = torch.arange(len(router_logits[0]) // rows, device=row_tokens.device)
    real = (places < row_tokens.unsqueeze(1)).float().unsqueeze(-1)  # [B, S, 1]
    sent, probability, load = 0, 0, []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1).unflatten(0, (rows, -1))
        chosen = probabilities.topk(experts_per_token).indices
        counts = real.new_zeros(rows, experts).scatter_add_(
            1, chosen.flatten(1), real.expand_as(chosen).flatten(1)
        )
        sent = sent + counts
        probability = probability + (probabilities * real).sum(1)
        load.append(counts.sum(0))
    tokens = (len(router_logits) * row_tokens).clamp(min=1).unsqueeze(1)
    return experts * (sent / tokens * (probability / tokens)).sum(1), torch.stack(load)


def _cross_entropy_head(
    batch: Mapping[str, Tensor], z_loss: float = 0.0, label_smoothing: float = 0.0
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    positions = batch["label_positions"]

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        valid = hidden.flatten(0, 1).index_select(0, positions)
        targets = batch["labels"].flatten().index_select(0, positions)
        return linear_cross_entropy_sum(
            valid, weight, targets, z_loss=z_loss, label_smoothing=label_smoothing
        )

    return head


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`cross_entropy(hidden @ weight.T, targets, reduction="sum")` without ever holding all logits.

    Logits are made chunk by chunk and turned into their own gradient at once, so that backward has nothing left to
    compute and [N, V] never exists. Softmax, loss and the gradient of the weight are accumulated in fp32, whatever
    the type of the inputs.

    Args:
        hidden: [N, D].
        weight: [V, D].
        targets: [N] int64, every one valid.
        z_loss: weight of the squared logarithm of the softmax's denominator, which keeps logits near zero
            (https://arxiv.org/abs/2204.02311, section 5).
        label_smoothing: share of the target that is spread evenly over the vocabulary
            (https://arxiv.org/abs/1512.00567).

    Returns:
        The sum to differentiate, and of it the cross-entropy alone, without gradient; scalars in fp32.
    """
    objective, cross_entropy = _LinearCrossEntropySum.apply(
        hidden, weight, targets, torch.is_grad_enabled(), z_loss, label_smoothing
    )
    return objective, cross_entropy


def map_logits(
    function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, *columns: Tensor
) -> Tensor:
    """`function(hidden @ weight.T, *columns)`, token by token, without ever holding all logits: for losses of your own.

    Logits are made chunk by chunk, and once more in backward: a fourth matrix product where `linear_cross_entropy_sum`
    takes three. The gradient of the weight is accumulated in fp32.

    Args:
        function: of logits [n, V] in fp32 and the same tokens of each column; returns a value for each token, [n], or
            several, [n, K]. What else it uses gets no gradient.
        hidden: [N, D].
        weight: [V, D].
        columns: [N, ...] each, such as the targets.

    Returns:
        [N] or [N, K].
    """
    dtype = _product_dtype(hidden)
    return _MapLogits.apply(function, hidden.to(dtype), weight.to(dtype), *columns)


def log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """[n]: the logarithm of the probability of each target; a function for `map_logits`."""
    return -F.cross_entropy(logits, targets, reduction="none")


class _MapLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, *columns: Tensor
    ) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(hidden, weight, *columns)
        return torch.cat(
            [
                function(_fresh_logits(hidden[rows], weight), *(c[rows] for c in columns))
                for rows in _chunks(hidden, weight)
            ]
        )

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        hidden, weight, *columns = ctx.saved_tensors
        hidden_needs, weight_needs = ctx.needs_input_grad[1:3]
        hidden_grad = torch.empty_like(hidden) if hidden_needs else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if weight_needs else None
        for rows in _chunks(hidden, weight):
            logits = _fresh_logits(hidden[rows], weight).requires_grad_()
            with torch.enable_grad():
                values = ctx.function(logits, *(column[rows] for column in columns))
            (grad,) = torch.autograd.grad(values, logits, grad_outputs[0][rows])
            grad = grad.to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(grad, weight, out=hidden_grad[rows])
            if weight_grad is not None:
                weight_grad += grad.T @ hidden[rows]
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
        return None, hidden_grad, weight_grad, *(None for _ in columns)


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """At least one, so that no tokens are mapped to no values."""
    size = chunk_rows(weight.shape[0], hidden.device)
    return [slice(start, start + size) for start in range(0, max(1, hidden.shape[0]), size)]


def _fresh_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return _logits(hidden, weight, hidden.new_empty(hidden.shape[0], weight.shape[0]))


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits exist at once."""
    size = CHUNK_BYTES
    if device.type == "cuda" and torch.cuda.is_available():
        size = max(size, int(torch.cuda.get_device_properties(device).total_memory * GPU_SHARE))
    return max(1, size // (4 * vocabulary))


def _product_dtype(tensor: Tensor) -> torch.dtype:
    """In which its matrix products are computed: fp32 on a CPU without bf16 units, where those of bf16 take 10 to 100 times as long."""
    if not tensor.is_cuda and tensor.dtype == torch.bfloat16 and not has_bf16_units():
        return torch.float32
    return tensor.dtype


def _logits(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """[n, V] in fp32; `buffer` [n, V], of the type of `hidden`, may be overwritten."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        # The product is summed in fp32 anyway: not rounding it saves a pass over it.
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return torch.mm(hidden, weight.T, out=buffer).float()


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        training: bool,
        z_loss: float,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        hidden_needs, weight_needs = (training and needed for needed in ctx.needs_input_grad[:2])
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        hidden_dtype, weight_dtype, dtype = hidden.dtype, weight.dtype, _product_dtype(hidden)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        hidden_grad = torch.empty_like(hidden) if hidden_needs else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if weight_needs else None
        chunk = chunk_rows(weight.shape[0], hidden.device)
        # One buffer for all chunks: on CPU each new one would be fresh pages to fault in.
        buffer = hidden.new_empty(min(chunk, hidden.shape[0]), weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, min(start + chunk, hidden.shape[0]))
            h, target = hidden[rows], targets[rows].unsqueeze(1)
            logits = _logits(h, weight, buffer[: len(h)])
            target_logits, peak = logits.gather(1, target), logits.amax(1, keepdim=True)
            mean_logits = logits.mean(1, keepdim=True) if label_smoothing else target_logits
            # Softmax, written over the logits: the maximum keeps exp finite.
            softmax = logits.sub_(peak).exp_()
            total = softmax.sum(1, keepdim=True)
            log_total = total.log() + peak
            cross_entropy = log_total - target_logits
            objective = cross_entropy.lerp(log_total - mean_logits, label_smoothing)
            sums += torch.cat([objective + z_loss * log_total**2, cross_entropy], 1).sum(0)
            if hidden_grad is None and weight_grad is None:
                continue
            # d objective / d logits = (1 + 2 z log_total) softmax - smoothing / V - (1 - smoothing) one_hot.
            grad = softmax.mul_((1 + 2 * z_loss * log_total) / total)
            if label_smoothing:
                grad -= label_smoothing / weight.shape[0]
            grad.scatter_add_(
                1, target, grad.new_full((1, 1), label_smoothing - 1).expand_as(target)
            )
            grad = grad.to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(grad, weight, out=hidden_grad[rows])
            if weight_grad is None:
                continue
            if h.dtype == weight_grad.dtype:
                weight_grad.addmm_(grad.T, h)
            else:
                weight_grad += grad.T @ h
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtypes = hidden_dtype, weight_dtype
        objective, cross_entropy = sums[0].clone(), sums[1].clone()  # FSDP wants no views
        ctx.mark_non_differentiable(cross_entropy)
        return objective, cross_entropy

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        loss_grad, _ = grad_outputs
        hidden_grad, weight_grad = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        if hidden_grad is not None:
            # In fp32: a factor rounded to bf16 would scale every gradient below the head by the same wrong 0.2 %.
            hidden_grad = (hidden_grad.float() * loss_grad).to(hidden_dtype)
        if weight_grad is not None:
            weight_grad = (weight_grad * loss_grad).to(weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None
