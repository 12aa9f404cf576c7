"""Packed documents stay apart, and the model is transformers' own."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from models.causal_lm import PackedCausalLM
from tests.support.models import IGNORE_INDEX, packed_batch, random_documents, tiny_model
from trainer.loss import causal_lm_loss, routed_causal_lm_loss

KINDS = ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"]  # softmax attention in every layer
LINEAR = ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"]
ATTENTIONS = ["packed", "sdpa"]
EACH = list(itertools.product(KINDS, ATTENTIONS))
EACH_LINEAR = [*itertools.product(LINEAR, ATTENTIONS), ("qwen4_exp_text", "sdpa")]


def _logits(model: PackedCausalLM, rows: list[list[Tensor]], seq_len: int, **options) -> Tensor:
    with torch.no_grad():
        return model(packed_batch(rows, seq_len, **options))


def _alone(model: PackedCausalLM, document: Tensor) -> Tensor:
    """[S, V]: what transformers' own forward says about one document."""
    with torch.no_grad():
        return model.hf(input_ids=document[None]).logits[0]


@pytest.mark.parametrize(("kind", "attention"), EACH)
def test_a_packed_document_has_the_logits_it_has_alone(kind: str, attention: str) -> None:
    model = tiny_model(kind, attention=attention).eval()
    reference = tiny_model(kind, attention="sdpa").eval()
    rows = [random_documents([5, 1, 9], seed=1), random_documents([16], seed=2)]
    rows.append(random_documents([1, 1, 3], seed=3))
    logits = _logits(model, rows, 16, max_documents=12)
    for row, documents in enumerate(rows):
        begin = 0
        for document in documents:
            end = begin + len(document)
            expected = _alone(reference, document)
            torch.testing.assert_close(logits[row, begin:end], expected, rtol=0, atol=5e-6)
            begin = end


@pytest.mark.parametrize(("kind", "attention"), EACH)
def test_no_document_and_no_padding_is_seen_by_another(kind: str, attention: str) -> None:
    model = tiny_model(kind, attention=attention).eval()
    a, b, c, d = random_documents([6, 5, 3, 9])
    before = _logits(model, [[a, b, c], [d]], 16)
    a2, d2 = (document.clone() for document in (a, d))
    a2[0], d2[3] = (a2[0] + 1) % 90, (d2[3] + 1) % 90
    after = _logits(model, [[a2, b, c], [d2]], 16, pad=7)
    # Experts multiply other tokens along, which may round differently.
    near = partial(torch.testing.assert_close, rtol=0, atol=5e-6 if "moe" in kind else 0)
    near(before[0, 6:14], after[0, 6:14])
    near(before[1, :3], after[1, :3])  # causal inside a document
    assert (before[0, :6] - after[0, :6]).abs().amax(-1).min() > 1e-3
    assert (before[1, 3:9] - after[1, 3:9]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize(("kind", "attention"), EACH_LINEAR)
def test_linear_attention_sees_one_document_a_row(kind: str, attention: str) -> None:
    """A row's document has the logits it has alone, whatever is padded behind it and whatever other rows hold."""
    model = tiny_model(kind, attention=attention).eval()
    reference = tiny_model(kind, attention="sdpa").eval()
    a, b, c = random_documents([9, 16, 1])
    logits = _logits(model, [[a], [b], [c]], 16)
    for row, document in enumerate((a, b, c)):
        expected = _alone(reference, document)
        torch.testing.assert_close(logits[row, : len(document)], expected, rtol=0, atol=5e-6)
    other = _logits(model, [[a], [a], [c]], 16, pad=7)
    torch.testing.assert_close(other[0, :9], logits[0, :9], rtol=0, atol=5e-6)


def test_repeated_offsets_change_nothing() -> None:
    model = tiny_model().eval()
    documents = random_documents([6, 5])
    few, many = (_logits(model, [documents], 16, max_documents=m) for m in (3, 40))
    assert torch.equal(few, many)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "attention"), EACH)
def test_loss_and_gradients_are_those_of_transformers(
    kind: str, attention: str, tied: bool
) -> None:
    model = tiny_model(kind, attention=attention, tied=tied)
    reference = tiny_model(kind, attention="sdpa", tied=tied).hf
    (document,) = random_documents([24])
    labels = document.clone()
    labels[:7] = IGNORE_INDEX  # a prompt
    batch = packed_batch([[document]], 24)
    batch["label_positions"] = batch["label_positions"][6:]  # predicts token 7 and what follows
    loss_sum, metrics = causal_lm_loss(model, batch)
    loss = loss_sum / len(batch["label_positions"])
    loss.backward()
    expected = reference(input_ids=document[None], labels=labels[None]).loss
    expected.backward()
    assert metrics == {}
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    assert set(gradients) == {name for name, _ in model.hf.named_parameters()}
    for name, parameter in model.hf.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    "kind", ["qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "qwen4_exp_text"]
)
def test_the_loss_of_routed_experts_is_that_of_transformers(kind: str) -> None:
    options = {"router_aux_loss_coef": 0.5, "moe_intermediate_size": 16}
    model = tiny_model(kind, **options)
    reference = tiny_model(kind, attention="sdpa", **options).hf
    (document,) = random_documents([24])
    batch = packed_batch([[document]], 24)
    valid = len(batch["label_positions"])
    loss_sum, metrics = routed_causal_lm_loss(model, batch, experts_per_token=2, aux_loss_coef=0.5)
    (loss_sum / valid).backward()
    expected = reference(input_ids=document[None], labels=document[None], output_router_logits=True)
    expected.loss.backward()
    assert 0.5 * float(expected.aux_loss.detach()) > 1
    torch.testing.assert_close(loss_sum / valid, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics["router_aux_loss"] / valid, expected.aux_loss)
    torch.testing.assert_close(metrics["loss"] + 0.5 * metrics["router_aux_loss"], loss_sum)
    assert metrics["expert_load"].sum(1).tolist() == [2.0 * 24] * len(expected.router_logits)
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in model.hf.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=5e-6)


def test_the_loss_of_a_packed_batch_is_the_sum_over_its_documents() -> None:
    model = tiny_model()
    documents = random_documents([6, 5, 3])
    with torch.no_grad():
        together = causal_lm_loss(model, packed_batch([documents], 16))[0]
        single = sum(
            causal_lm_loss(model, packed_batch([[document]], len(document)))[0]
            for document in documents
        )
    torch.testing.assert_close(together, single, rtol=1e-6, atol=0)


def test_generate_uses_dense_attention_and_gives_the_packed_one_back() -> None:
    model = tiny_model().eval()
    packed = model.hf.config._attn_implementation
    (prompt,) = random_documents([5])
    with torch.no_grad():
        output = model.generate(
            input_ids=prompt[None],
            attention_mask=torch.ones(1, 5, dtype=torch.int64),
            do_sample=False,
            max_new_tokens=4,
            eos_token_id=None,
        )
    assert output.shape == (1, 9)
    assert model.hf.config._attn_implementation == packed != "sdpa"
    with pytest.raises(RuntimeError, match="no batch"):
        _fail_inside_generate(model)
    assert model.hf.config._attn_implementation == packed


def _fail_inside_generate(model: PackedCausalLM) -> None:
    from models.causal_lm import dense_attention

    with dense_attention(model.hf):
        assert model.hf.config._attn_implementation == "sdpa"
        raise RuntimeError("no batch")
